"""Tables of measured numbers, printed and saved as Markdown beside the hardware, the versions and the command."""

import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch


@dataclass(frozen=True)
class Table:
    """Numbers as text.

    Attributes:
        title: what was measured.
        columns: headings.
        rows: one text per column.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        widths = [max(map(len, cells)) for cells in zip(self.columns, *self.rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        return "\n".join([f"**{self.title}**", "", line(self.columns), rule, *map(line, self.rows)])


@dataclass(frozen=True)
class Report:
    """What a case found.

    Attributes:
        name: of the case.
        about: how it was measured, Markdown.
        tables: the numbers.
        pictures: file names beside the report.
        folder: where it is saved; None for the folder of results.
    """

    name: str
    about: str
    tables: tuple[Table, ...]
    pictures: tuple[str, ...] = ()
    folder: Path | None = None

    def save(self, results: Path, seconds: float) -> Path:
        parts = [f"# {self.name}", self.about, *(table.markdown() for table in self.tables)]
        parts += [f"![{picture}]({picture})" for picture in self.pictures]
        parts.append(f"{_circumstances()}\n- took {seconds:.0f} s in all")
        path = (self.folder or results) / f"{self.name}.md"
        path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        return path


def best_times(variants: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of every run of each variant, after one run to warm up; turns are taken, so that a machine which is busy
    for a while slows all of them alike."""
    for variant in variants:
        variant()
    times: list[list[float]] = [[] for _ in variants]
    for _ in range(repeats):
        for variant, spent in zip(variants, times, strict=True):
            spent.append(timed(variant))
    return times


def timed(work: Callable[[], object]) -> float:
    """Seconds of one run, all work on the device included."""
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - start


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _circumstances() -> str:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy"))
    return "\n".join(
        [
            f"- command: `{shlex.join(['python', 'benchmarks/run.py', *sys.argv[1:]])}`",
            f"- CPU: {_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; GPU: {gpu}",
            f"- {platform.system()} {platform.machine()}, Python {platform.python_version()}, {packages}, "
            f"ComfyUI {_comfyui_version()}",
            f"- {time.strftime('%Y-%m-%d')}",
        ]
    )


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _comfyui_version() -> str:
    from comfyui_version import __version__

    return str(__version__)
