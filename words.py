"""Words as people type them, whatever their keyboard: lists, labels, and the patterns that pick labels."""

import re
import unicodedata
from collections.abc import Iterable
from fnmatch import fnmatchcase

_TYPED = str.maketrans(
    {"，": ",", "、": ",", "､": ",", "،": ",", "；": ";", "؛": ";", "：": ":", "＊": "*", "？": "?", "－": "-"}
)
"""Marks that an input method for Chinese, Japanese or Arabic gives for those of lists and patterns."""

_UNSEEN = {"Cc", "Cs", "Zl", "Zp"}
"""Categories that break a line or a message: control characters, halves of surrogate pairs, line separators."""


def split_list(text: str) -> list[str]:
    """The entries of a list written with commas, semicolons or one per line; blanks are left out."""
    return [entry.strip() for entry in re.split(r"[,;\r\n]", text.translate(_TYPED)) if entry.strip()]


def tidy(text: str) -> str:
    """One line with single blanks, accents composed: the same words are the same text however they were stored."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if not text.isprintable():
        text = "".join(" " if unicodedata.category(letter) in _UNSEEN else letter for letter in text)
    return " ".join(text.split())


def folded(text: str) -> str:
    """Tidy, and the same for upper and lower case."""
    return tidy(tidy(text).lower())


def fits(label: str, patterns: Iterable[str]) -> bool:
    """Whether a label fits one of some patterns, which ``folded`` has prepared; * and ? are the only wildcards."""
    name = folded(label)
    return any(fnmatchcase(name, pattern.replace("[", "[[]")) for pattern in patterns)
