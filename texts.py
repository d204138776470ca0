"""Words that came with a graph or a file, made fit to be shown: on a node, in a log, in a message, in a picture."""

import re
import unicodedata

MOST_LETTERS = 2000
"""Longer texts are shown without their middle: what they are about stands at the start, what to do at the end."""

_HIDDEN = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode's controls, halves of pairs (which cannot be encoded) and breaks of lines."""

_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that change the order in which the letters around them are shown."""

_MARKUP = re.compile(r"[<&[]|:(?=//)|\bwww(?=\.)", re.IGNORECASE)
_JOINER = "\u2060"


def readable(text: str, most: int = MOST_LETTERS) -> str:
    """A text on one line: what would move the cursor, colour a terminal or turn letters round is written as an escape.

    Args:
        text: of any origin.
        most: letters; of a longer text the middle is left out.
    """
    if len(text) > most:
        half = most // 2
        text = f"{text[:half]} … {text[-half:]}"
    return "".join(escaped(letter) if is_hidden(letter) else letter for letter in text)


def is_hidden(letter: str) -> bool:
    """True for what has no look of its own and changes how the text around it is shown."""
    return letter in _TURNING or unicodedata.category(letter) in _HIDDEN


def escaped(letter: str) -> str:
    """A letter by its number, as Python and JSON write it."""
    return letter.encode("unicode_escape").decode("ascii")


def inert(text: str) -> str:
    """A text that ComfyUI's page shows letter by letter, whether it reads it as HTML or not.

    Pages differ: older ones put the text under a node into the document as HTML, and make links of addresses and of
    ``[[label|address]]``; newer ones escape it first, so that escapes of ours would be seen. An invisible word joiner
    behind each sign that starts a tag, an entity or a link means the same to both: the sign itself.
    """
    return _MARKUP.sub(lambda sign: sign[0] + _JOINER, text)
