"""Runs mypy over the pack, the scripts and the shared test builders.

The repository root is itself the package, whatever its folder is called: mypy sees it through a link of its name.
"""

import os
import subprocess
import sys

import workspace


def main() -> int:
    links = workspace.CACHE / "typecheck"
    workspace.link_folder(links / workspace.PACK, workspace.ROOT)
    folders = (links, workspace.comfyui_path(), workspace.ROOT / "tests", workspace.ROOT / "scripts")
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
