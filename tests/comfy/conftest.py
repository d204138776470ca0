from pathlib import Path

import pytest

from harness.refining import Studio


@pytest.fixture(scope="session", params=["sd15", "sdxl"])
def studio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """Both families, one after the other."""
    return Studio(request.param, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    folder: Path = tmp_path_factory.mktemp("models")
    return Studio("sd15", folder)
