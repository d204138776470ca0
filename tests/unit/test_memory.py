"""Peak memory of a refinement: canvas and one chunk of eight crops, however large the picture, however many regions.

Each measurement runs in a process of its own, where the picture exists before it begins and the model is trivial.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROBE = Path(__file__).resolve().parents[2] / "benchmarks" / "memory_probe.py"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the resident size from /proc")


def measure(kind: str, side: int) -> dict[str, int]:
    """Bytes; see the probe."""
    command = [sys.executable, str(PROBE), kind, str(side)]
    # Freed blocks of any size go back to the system: what is measured is what is held, not what malloc keeps in store.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    finished = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found: dict[str, int] = json.loads(finished.stdout)
    return found


def allowed(found: dict[str, int]) -> int:
    return found["canvas"] + found["mask"] + found["kept"] + found["chunk"]


def test_tiles_need_the_canvas_and_one_chunk_of_crops() -> None:
    found = measure("tiles", 4096)
    assert found["peak"] <= allowed(found)


def test_thirty_regions_need_the_canvas_their_crops_and_one_chunk() -> None:
    found = measure("regions", 4096)
    assert found["kept"] == 2 * 30 * 1024 * 1024 * 3 * 4
    assert found["peak"] <= allowed(found)


def test_the_measurement_sees_what_is_held() -> None:
    """Crops that are kept must show in the peak, or the measurement would see nothing."""
    without, kept = measure("tiles", 2048), measure("regions", 2048)
    assert kept["peak"] - without["peak"] > 0.8 * kept["kept"]
