"""The demo on a real server: nine faces come back, in one sampling call."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness import demonstration
from harness.server import ComfyServer
from training.scenes import FACES

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("server")]


def test_nine_faces_come_nearer_to_the_truth_in_one_call_and_nothing_else_changes(
    server: ComfyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demonstration.demonstrate(server, FACES, tmp_path)
    printed = capsys.readouterr().out
    before, after, truth = (Image.open(tmp_path / f"{name}.png") for name in ("before", "after", "truth"))
    ends, starts = demonstration.likenesses(after, FACES), demonstration.likenesses(before, FACES)
    assert np.mean([end.ssim - start.ssim for end, start in zip(ends, starts, strict=True)]) > 0.05, printed
    assert "  1 sampling call of 9 rows, " in printed
    assert all(f"  {face.name} " in printed for face in FACES.faces)
    assert Image.open(tmp_path / "side_by_side.png").width > 3 * truth.width

    changed = (np.asarray(before) != np.asarray(after)).any(-1)
    for x1, y1, x2, y2 in (face.box for face in FACES.faces):
        assert changed[y1:y2, x1:x2].mean() > 0.5
        changed[max(0, y1 - 17) : y2 + 17, max(0, x1 - 17) : x2 + 17] = False  # the feather of 16 px
    assert not changed.any()
