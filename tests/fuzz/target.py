"""A target: one format that comes into the pack from outside, how to make such input, and the code that reads it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

Run = Callable[[Any], object]

MODULES = ("detection_targets", "refiner_targets", "file_targets")

_targets: dict[str, "Target"] = {}


@dataclass(frozen=True)
class Target:
    """One input format.

    Attributes:
        name: of the function that reads it.
        inputs: good, damaged and absurd ones.
        run: reads one; only the pack's declared errors may come out.
        slow: loads large libraries or takes long for one input; left to the long part.
    """

    name: str
    inputs: st.SearchStrategy[Any]
    run: Run
    slow: bool = False


def target(inputs: st.SearchStrategy[Any], slow: bool = False) -> Callable[[Run], Run]:
    """Makes a target of a function of one input."""

    def register(run: Run) -> Run:
        _targets[run.__name__] = Target(run.__name__, inputs, run, slow)
        return run

    return register


def all_targets() -> list[Target]:
    """In the order they are written."""
    for module in MODULES:
        importlib.import_module(f"fuzz.{module}")
    return list(_targets.values())
