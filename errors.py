"""Luna's errors: what a user can mend is a ``LunaInputError``, what the run could not do is a ``LunaRuntimeError``.

Messages name the input, what was given and what to do.
"""

from .texts import readable


class LunaError(Exception):
    """Base of every error Luna raises on purpose.

    Messages quote labels, names and texts of graphs and files: each line of them is made readable.
    """

    def __init__(self, message: str) -> None:
        super().__init__("\n".join(map(readable, message.split("\n"))))


class LunaInputError(LunaError, ValueError):
    """An input that cannot be used; raised before any sampling starts."""


class LunaRuntimeError(LunaError, RuntimeError):
    """Something that went wrong while working, for example not enough memory for a single row."""
