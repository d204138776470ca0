"""Seconds and bytes that one input takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


@dataclass
class Taken:
    """What a piece of work took: seconds of the processor, and bytes at its peak beyond those before."""

    seconds: float = 0.0
    peak_bytes: int = 0


@contextmanager
def measured() -> Iterator[Taken]:
    """Fills in what the block took, also where it raises."""
    taken = Taken()
    before, start = _start(), time.process_time()
    try:
        yield taken
    finally:
        taken.seconds = time.process_time() - start
        taken.peak_bytes = _peak() - before


def _start() -> int:
    """Bytes in use; on Linux the peak is counted from here."""
    if _RESET.exists():
        _RESET.write_text("5")
    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    """Bytes at the peak on Linux and Windows, elsewhere those in use at the end."""
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    memory = psutil.Process().memory_info()
    return int(getattr(memory, "peak_wset", memory.rss))
