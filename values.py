"""Single values as other programs and people give them: numbers and text, checked in one place for every input.

Whatever is given, only a ``LunaInputError`` comes out, and its message is short.
"""

import math
import reprlib
from typing import Any

import numpy as np
from torch import Tensor

from .errors import LunaInputError

LARGEST = 1e9
"""No px, count or strength is larger: sums and products of such numbers stay finite."""

LONGEST_TEXT = 1000
"""Characters of a label or a concept."""

SHOWN = 60
"""Characters of a value that a message shows."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = SHOWN


def shown(value: object) -> str:
    """A value for a message: short and on one line, whatever it is."""
    try:
        text = " ".join(_SHORT.repr(value).split())
    except (ValueError, TypeError, RuntimeError, RecursionError):  # numbers of thousands of digits, odd classes
        return f"a {type(value).__name__}"
    return text if len(text) <= 2 * SHOWN else f"{text[: 2 * SHOWN]}…"


def real(value: Any, name: str) -> float:
    """A finite number: Python's, NumPy's, of a tensor of one element, or written as text.

    Raises:
        LunaInputError: naming ``name``.
    """
    try:
        entry = _only(value) if isinstance(value, Tensor | np.ndarray | list | tuple) else value
        if isinstance(entry, bool | np.bool_) or not isinstance(entry, int | float | np.number | str):
            raise TypeError("no number")
        number = float(entry)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise LunaInputError(f"{name} is {shown(value)}: a finite number is needed") from error
    if not math.isfinite(number) or abs(number) > LARGEST:
        raise LunaInputError(f"{name} is {shown(value)}: a finite number of at most {LARGEST:g} is needed")
    return number


def _only(value: Any) -> Any:
    """The one element of a tensor, array or list."""
    entries = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
    return entries.reshape(()).item()


def whole(value: Any, name: str, least: int = 0) -> int:
    """A whole number of ``least`` or more.

    Raises:
        LunaInputError: naming ``name``.
    """
    number = real(value, name)
    if number != int(number) or number < least:
        raise LunaInputError(f"{name} is {shown(value)}: a whole number of {least} or more is needed")
    return int(number)


def fraction(value: Any, name: str) -> float:
    """A number from 0 to 1 that a widget or a node gave, so no text.

    Raises:
        LunaInputError: naming ``name``.
    """
    try:
        number = math.nan if isinstance(value, str) else real(value, name)
    except LunaInputError:
        number = math.nan
    if not 0 <= number <= 1:
        raise LunaInputError(f"{name} is {shown(value)}: a fraction from 0 to 1 is needed")
    return number


def text(value: Any, name: str) -> str:
    """Text that a widget or a node gave.

    Raises:
        LunaInputError: it is none.
    """
    if not isinstance(value, str):
        raise LunaInputError(f"{name} is {shown(value)}: text is needed")
    return value
