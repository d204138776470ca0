"""Which environment belongs to which ComfyUI, and what is installed into it."""

import subprocess
import sys
from pathlib import Path

import pytest

from harness import workspace


def a_comfyui(folder: Path, requirements: str = "torch\n") -> Path:
    folder.mkdir(parents=True)
    (folder / "main.py").write_text("", encoding="utf-8")
    (folder / "requirements.txt").write_text(requirements, encoding="utf-8")
    return folder


def test_each_comfyui_has_an_environment_of_its_own(tmp_path: Path) -> None:
    one, other = (a_comfyui(tmp_path / place / "My ComfyUI ü") for place in ("one", "other"))
    environments = [workspace.host_environment(folder) for folder in (one, other)]
    folders = {environment.folder for environment in environments} | {workspace.shared_environment().folder}
    assert len(folders) == 3
    assert {folder.parent for folder in folders} == {workspace.CACHE / "hosts", workspace.CACHE}
    assert [environment.comfyui for environment in environments] == [one, other]
    roundabout = tmp_path / "one" / "." / ".." / "one" / "My ComfyUI ü"
    assert workspace.host_environment(roundabout) == environments[0]


def test_the_releases_pins_are_kept_and_pytorch_is_the_workspaces(tmp_path: Path) -> None:
    lines = (
        "front-end==1.49.6",
        "torch>=2.4",
        "torchsde",
        "torchvision",
        "TorchAudio==2.1 ; x",
        "",
        "# more",
        "av>=16",
    )
    requirements = workspace.host_environment(a_comfyui(tmp_path / "host", "\n".join(lines))).requirements()
    assert requirements == ["front-end==1.49.6", "torchsde", "av>=16", *workspace.TOOLS]


@pytest.mark.parametrize("given", ["missing", "no_main", "no_requirements"])
def test_a_folder_that_is_no_comfyui_is_named_before_anything_is_made(tmp_path: Path, given: str) -> None:
    folder = tmp_path / given
    if given != "missing":
        a_comfyui(folder)
        (folder / ("main.py" if given == "no_main" else "requirements.txt")).unlink()
    with pytest.raises(workspace.SetupError, match=f"FOLDER .*{given} is no ComfyUI folder"):
        workspace.set_up_host(folder)
    assert not workspace.host_environment(folder).folder.exists()


def test_noxfile_needs_nothing_but_the_standard_library_for_the_workspace() -> None:
    """Before the first set-up there is no PyTorch, and nox may live in an environment of its own."""
    code = f"import sys; sys.path.append({str(workspace.ROOT)!r}); from harness import workspace; print(workspace.ROOT)"
    finished = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert finished.stdout.strip() == str(workspace.ROOT), finished.stderr
