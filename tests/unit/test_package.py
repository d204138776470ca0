"""The pack as it is published: it imports, and all that it imports is declared or comes with ComfyUI."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from harness.workspace import RELEASES, ROOT, comfyui_path, release_path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@cache
def declared() -> dict[str, Requirement]:
    """Name of each package in pyproject.toml to its range."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return _by_name(project["dependencies"])


def required_by(comfyui: Path) -> dict[str, Requirement]:
    """The same of a ComfyUI's own requirements."""
    lines = (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return _by_name([line.strip() for line in lines if line.strip()[:1] not in ("", "#")])


def _by_name(lines: list[str]) -> dict[str, Requirement]:
    return {canonicalize_name(found.name): found for found in map(Requirement, lines)}


def published_files() -> list[Path]:
    """Python files of the registry's archive: all but what .comfyignore leaves out."""
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    left_out = {line.strip("/") for line in lines if not line.startswith("#")}
    entries = [entry for entry in ROOT.iterdir() if entry.name not in left_out and not entry.name.startswith(".")]
    return [file for entry in entries for file in ([entry] if entry.suffix == ".py" else sorted(entry.rglob("*.py")))]


def foreign_imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Packages from outside Python, ComfyUI and the pack, and whether they are imported along with the file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    at_once = set(map(id, tree.body))
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names:
            if not any((comfyui_path() / found).exists() for found in (name, f"{name}.py")):
                yield name, id(node) in at_once


def test_pack_imports_and_lists_nodes() -> None:
    import luna_refinement

    assert luna_refinement.comfy_entrypoint() is not None


def test_every_package_the_pack_imports_is_declared_and_the_optional_ones_come_with_comfyui() -> None:
    """Those imported along with a file are declared; those a function imports may be left to ComfyUI's requirements."""
    distributions, comfyui = packages_distributions(), required_by(comfyui_path())
    files = published_files()
    assert {"nodes", "batching", "ip_adapter", "sam3_bridge"} <= {file.parent.name for file in files}
    missing = [
        f"{file.relative_to(ROOT)}: {module}"
        for file in files
        for module, at_once in foreign_imports(file)
        if not {canonicalize_name(name) for name in distributions.get(module, [module])}
        & (declared().keys() | (set() if at_once else comfyui.keys()))
    ]
    assert missing == []


def test_the_declared_ranges_hold_what_runs_here() -> None:
    found = {name: version(name) for name in declared()}
    assert [name for name in found if not declared()[name].specifier.contains(found[name], prereleases=True)] == []


def test_no_range_asks_more_than_the_oldest_comfyui_does() -> None:
    """Installing the pack changes nothing in it: PyTorch above all keeps the build that fits the user's machine."""
    oldest = release_path(RELEASES[-1])
    if not oldest.is_dir():
        pytest.skip("only `nox -s tests` unpacks the oldest ComfyUI")
    pins = required_by(oldest)
    assert not declared()["torch"].specifier
    assert declared().keys() <= pins.keys()
    for name, requirement in declared().items():
        for pin in pins[name].specifier:
            assert requirement.specifier.contains(pin.version), f"{requirement} does not take {pins[name]}"
