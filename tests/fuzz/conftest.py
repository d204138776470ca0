"""How much is fed: a short seeded part with the other tests, ten thousand inputs and more by ``nox -s fuzz``."""

import math
import os

import pytest
from fuzz.target import Target, all_targets
from hypothesis import HealthCheck, Phase, settings

INPUTS = 10_000
"""Of the long part, over all targets."""

SHORT = settings(
    max_examples=12,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


def profile_for(targets: int) -> settings:
    """The settings of the part that is asked for."""
    if os.environ.get("LUNA_FUZZ") != "long":
        return SHORT
    return settings(SHORT, max_examples=math.ceil(INPUTS / targets), derandomize=False, phases=tuple(Phase))


def chosen_targets() -> list[Target]:
    """The slow ones are for the long part."""
    long = os.environ.get("LUNA_FUZZ") == "long"
    return [target for target in all_targets() if long or not target.slow]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        targets = chosen_targets()
        metafunc.parametrize("target", targets, ids=[target.name for target in targets])


@pytest.fixture(scope="session")
def profile() -> settings:
    return profile_for(len(chosen_targets()))
