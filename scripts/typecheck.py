"""Runs mypy over the pack, the scripts and the shared harness.

The repository root is itself the package, whatever its folder is called: mypy sees it through a link of its name.
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: ComfyUI has a module ``nodes`` of its own

from harness import workspace


def main() -> int:
    links = workspace.CACHE / "typecheck"
    workspace.link_folder(links / workspace.PACK, workspace.ROOT)
    own = [workspace.ROOT / folder for folder in ("tests", "scripts", "benchmarks", ".")]
    folders = (links, workspace.comfyui_path(), *own)  # ComfyUI's ``nodes`` before ours
    environment = os.environ | {"MYPYPATH": os.pathsep.join(map(str, folders))}
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        str(workspace.ROOT / "pyproject.toml"),
        "-p",
        workspace.PACK,
    ]
    return subprocess.run(command, cwd=links, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
