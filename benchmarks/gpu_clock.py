"""Time, memory and transfers on any device: CUDA's own events where there are any, the host's clock otherwise."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.model_management as management
import torch
from torch.utils._python_dispatch import TorchDispatchMode

GIB = 1024**3
HAS_CUDA = torch.cuda.is_available()
NEEDS_CUDA = "needs CUDA"
_WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)


class OutOfTime(Exception):
    """The minutes of the run are over: what is left is named in the report."""


class Budget:
    """The time that is left of a run."""

    def __init__(self, minutes: float) -> None:
        self._end = time.perf_counter() + 60 * minutes

    def left(self) -> float:
        """Seconds."""
        return self._end - time.perf_counter()

    def need(self, seconds: float = 0.0) -> None:
        """Raises OutOfTime where less is left."""
        if self.left() <= seconds:
            raise OutOfTime


def now() -> float:
    """Seconds, with all work on the device done."""
    if HAS_CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], object]) -> float:
    start = now()
    work()
    return now() - start


def in_turns(variants: Mapping[str, Callable[[], object]], repeats: int, budget: Budget) -> dict[str, list[float]]:
    """Seconds of each variant's runs after one to warm up; turns are taken, and end early where the time is over.

    Raises:
        OutOfTime: not even one turn after the first fits.
    """
    turn = 0.0
    for work in variants.values():
        budget.need(turn)
        turn += timed(work)
    times: dict[str, list[float]] = {name: [] for name in variants}
    budget.need(turn)
    for _ in range(repeats):
        for name, work in variants.items():
            times[name].append(timed(work))
        if budget.left() < 1.2 * turn:
            break
    return times


def spread(times: list[float], digits: int = 2) -> str:
    """Median and range."""
    return f"{statistics.median(times):.{digits}f} ({min(times):.{digits}f}–{max(times):.{digits}f})"


class Marks:
    """Moments on the device's own line of work: taking one does not wait for it."""

    def __init__(self) -> None:
        self._marks: list[Any] = []

    def take(self) -> None:
        if HAS_CUDA:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self._marks.append(mark)
        else:
            self._marks.append(time.perf_counter())

    def pairs(self) -> list[float]:
        """Seconds from the first mark to the second, from the third to the fourth, and so on."""
        couples = zip(self._marks[::2], self._marks[1::2], strict=True)
        if not HAS_CUDA:
            return [stop - start for start, stop in couples]
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) / 1000 for start, stop in couples]


class Traffic(TorchDispatchMode):
    """Counts reads of values by the host, which wait for the device, and copies from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = self.copies = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in _WAITS:
            self.waits += 1
        elif packet in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if packet is torch.ops.aten.copy_ else args[0]
            if isinstance(source, torch.Tensor) and source.device != result.device:
                self.copies += 1
                self.bytes += source.nbytes
        return result


def peak_bytes(work: Callable[[], object]) -> int | None:
    """What the work takes on the device beyond what is there before it; None without CUDA."""
    if not HAS_CUDA:
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@contextmanager
def card_of(gib: float) -> Iterator[None]:
    """As if the card had so much memory: the rest is held by one tensor, and no model is loaded.

    Raises:
        ValueError: the card has less.
    """
    management.unload_all_models()
    management.soft_empty_cache(True)
    free, total = torch.cuda.mem_get_info()
    held = total - int(gib * GIB)
    if not 0 <= held < free:
        raise ValueError(f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free")
    ballast = torch.empty(held, dtype=torch.uint8, device=management.get_torch_device())
    try:
        yield
    finally:
        del ballast
        management.unload_all_models()
        management.soft_empty_cache(True)


def gib(count: int | None) -> str:
    return NEEDS_CUDA if count is None else f"{count / GIB:.2f}"
