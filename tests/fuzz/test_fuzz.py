"""Whatever comes in, only the pack's declared errors come out, soon and in little memory."""

from typing import Any

import pytest
from fuzz.measure import measured
from fuzz.target import Target
from hypothesis import given, note, settings
from luna_refinement.errors import LunaError

MOST_SECONDS = 5.0
MOST_BYTES = 500 * 2**20
LONGEST_MESSAGE = 4000
ENOUGH = 100
"""Inputs of which one at least must be read, or the target tests nothing but its first check."""


@pytest.mark.timeout(1800)
def test_only_declared_errors_come_out(target: Target, profile: settings) -> None:
    read = 0

    @profile
    @given(target.inputs)
    def feed(given_input: Any) -> None:
        nonlocal read
        said = ""
        with measured() as taken:
            try:
                target.run(given_input)
                read += 1
            except LunaError as error:
                said = str(error)
        note(f"{taken.seconds:.2f} s, {taken.peak_bytes / 2**20:.0f} MiB, {said[:200]}")
        assert taken.seconds < MOST_SECONDS
        assert taken.peak_bytes < MOST_BYTES
        assert len(said) < LONGEST_MESSAGE
        said.encode("utf-8")  # a message that cannot be written cannot be read

    feed()
    assert read or profile.max_examples < ENOUGH
