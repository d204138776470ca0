"""Concepts in words: what SAM3 looks for, how many of each at most, and what it must leave out."""

import re
from dataclasses import dataclass

from ..errors import LunaInputError
from ..values import LONGEST_TEXT, shown
from ..values import text as checked_text
from ..words import folded, split_list, tidy

MOST_CONCEPTS = 256
"""Of one run; each is looked for on its own."""


@dataclass(frozen=True)
class Concept:
    """One thing to look for.

    Attributes:
        text: the words SAM3 reads; they become the label.
        limit: at most so many in each picture, the best first; 0 for all.
        excluded: what is found is taken out of the other concepts instead of being kept.
    """

    text: str
    limit: int = 0
    excluded: bool = False


def parse_concepts(text: str, name: str = "concepts") -> tuple[Concept, ...]:
    """Reads ``face:9, left hand, -glove``: separated by commas or lines, ``:9`` for at most nine, ``-`` to leave out.

    Raises:
        LunaInputError: there is nothing to look for, or too much, a concept comes twice, or a limit is no number
            above 0.
    """
    entries = split_list(checked_text(text, name))
    if len(entries) > MOST_CONCEPTS:
        raise LunaInputError(f"{name} holds {len(entries)} concepts: at most {MOST_CONCEPTS} can be looked for at once")
    concepts = tuple(_concept(entry, name) for entry in entries)
    if not any(not concept.excluded for concept in concepts):
        raise LunaInputError(
            f"{name} is {shown(text)}: it names nothing to look for. Write concepts with commas or one per line, "
            "for example face, hands:4"
        )
    seen = set()
    for concept in concepts:
        if folded(concept.text) in seen:
            raise LunaInputError(f"{name}: {shown(concept.text)} is named twice: name each concept once")
        seen.add(folded(concept.text))
    return concepts


def _concept(entry: str, name: str) -> Concept:
    excluded = entry.startswith("-")
    words, _, count = entry.lstrip("-").partition(":")
    words = tidy(words)
    if len(words) > LONGEST_TEXT:
        raise LunaInputError(f"{name}: {shown(words)} has {len(words)} characters: name the thing in a few words")
    if not words:
        raise LunaInputError(f"{name}: {shown(entry)} holds no words: write for example face:9 or -hand")
    limit = 0
    if ":" in entry:
        if not re.fullmatch(r"\s*[1-9][0-9]{0,5}\s*", count):
            raise LunaInputError(
                f"{name}: {shown(entry)} needs a whole number above 0 (up to 999999) after the colon: face:9"
            )
        limit = int(count)
    if excluded and limit:
        raise LunaInputError(f"{name}: {shown(entry)} leaves something out, so it can have no limit: write -{words}")
    return Concept(words, limit, excluded)
