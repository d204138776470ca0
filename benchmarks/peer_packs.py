"""Other packs, from a folder of checkouts: found there, and loaded by ComfyUI's own loader of custom nodes."""

import asyncio
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

VARIABLE = "LUNA_BENCH_PEERS"
SITE = "site"
"""Folder beside the checkouts for the packages that they need, as ``pip install --target`` fills it; optional."""


@dataclass(frozen=True)
class Pack:
    """A pack that Luna is measured beside.

    Attributes:
        name: for tables.
        repository: owner/name on GitHub; the checkout's folder has that name.
    """

    name: str
    repository: str

    @property
    def folder(self) -> str:
        return self.repository.split("/")[1]

    def version(self, packs: Path) -> str:
        """As its pyproject.toml says."""
        found = re.search(r'^version *= *"(.+?)"', (packs / self.folder / "pyproject.toml").read_text("utf-8"), re.M)
        return found[1] if found else "of unknown version"


# Impact Pack last: it asks ComfyUI for the nodes of IPAdapter_plus.
PACKS = (
    Pack("IPAdapter_plus", "cubiq/ComfyUI_IPAdapter_plus"),
    Pack("Ultimate SD Upscale", "ssitu/ComfyUI_UltimateSDUpscale"),
    Pack("Impact Pack", "ltdrdata/ComfyUI-Impact-Pack"),
)


def packs_folder(environment: Mapping[str, str]) -> Path:
    """The folder of checkouts.

    Raises:
        SystemExit: the variable names none, or a pack is missing there.
    """
    wanted = ", ".join(f"https://github.com/{pack.repository}" for pack in PACKS)
    given = environment.get(VARIABLE, "")
    if not given:
        raise SystemExit(
            f"peers: set {VARIABLE} to a folder that holds checkouts of {wanted} (and, in its folder {SITE}, the "
            "packages they need): they are no part of this repository"
        )
    folder = Path(given).expanduser().resolve()
    missing = [pack.repository for pack in PACKS if not (folder / pack.folder / "__init__.py").is_file()]
    if missing:
        raise SystemExit(f"peers: {VARIABLE} is {folder}, which holds no checkout of {', '.join(missing)}")
    return folder


def load_packs(folder: Path) -> Mapping[str, Any]:
    """Loads the packs into this process.

    Returns:
        ComfyUI's node classes by id.

    Raises:
        SystemExit: a pack does not load; ComfyUI has logged why.
    """
    import folder_paths

    import nodes

    sys.path.append(str(folder / SITE))  # last: ComfyUI's own packages come first
    folder_paths.set_user_directory(mkdtemp())
    failed = [pack.name for pack, loaded in zip(PACKS, asyncio.run(_load(folder)), strict=True) if not loaded]
    if failed:
        raise SystemExit(f"peers: ComfyUI cannot load {', '.join(failed)}; its log above says why")
    classes: Mapping[str, Any] = nodes.NODE_CLASS_MAPPINGS
    return classes


async def _load(folder: Path) -> list[bool]:
    import server

    import nodes

    server.PromptServer(asyncio.get_running_loop())  # as main.py does: packs add their routes to it
    return [await nodes.load_custom_node(str(folder / pack.folder)) for pack in PACKS]
