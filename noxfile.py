"""The commands of this repository: ``nox -s`` with demo, tests, host, fuzz, lint, bench or train.

They share the environment in ``.cache/venv``, which the first command builds (see harness/workspace.py); ``host``
builds one for each ComfyUI that it is shown.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT))  # last: ComfyUI has a module ``nodes`` of its own

from harness import workspace  # noqa: E402

nox.options.sessions = ["tests"]
nox.options.default_venv_backend = "none"


def _set_up(session: nox.Session, steps: Callable[[], Path] = workspace.set_up) -> str:
    """Carries out the steps and returns the Python that they prepared."""
    try:
        python = steps()
    except workspace.SetupError as error:
        session.error(str(error))
    return str(python)


def _lint(session: nox.Session, python: str) -> None:
    session.run(python, "-m", "ruff", "check", ".", external=True)
    session.run(python, "-m", "ruff", "format", "--check", ".", external=True)
    session.run(python, str(ROOT / "scripts" / "typecheck.py"), external=True)


def _test(session: nox.Session, python: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    # Each worker loads ComfyUI and PyTorch: more of them only where there is memory and a core for each.
    workers = str(max(1, min(2, os.cpu_count() or 1)))
    parallel = [] if arguments else ["-n", workers, "--dist", "loadgroup"]
    threads = {"OMP_NUM_THREADS": "1"} if parallel else {}
    session.run(python, "-m", "pytest", *parallel, *arguments, env={**threads, **environment}, external=True)


@nox.session
def demo(session: nox.Session) -> None:
    """Bring nine faces back in a real ComfyUI; ``-- --chess`` a crowd, ``-- --serve`` leaves the web page open."""
    python = _set_up(session, partial(workspace.set_up, families=("faces",)))
    session.run(python, str(ROOT / "scripts" / "demo.py"), *session.posargs, external=True)


@nox.session
def tests(session: nox.Session) -> None:
    """Check style and types, then run all tests; ``nox -s tests -- tests/unit -k plan`` runs only those tests."""
    python = _set_up(session, partial(workspace.set_up, with_older_comfyui=True))
    if not session.posargs:
        _lint(session, python)
    _test(session, python, session.posargs, {})


@nox.session
def host(session: nox.Session) -> None:
    """Run all tests on any ComfyUI, which is not written to: ``nox -s host -- FOLDER`` (and arguments for pytest)."""
    if not session.posargs:
        session.error("name the folder of the ComfyUI to test: nox -s host -- FOLDER")
    comfyui = Path(session.invoked_from, Path(session.posargs[0]).expanduser()).resolve()
    python = _set_up(session, partial(workspace.set_up_host, comfyui))
    bytecode = str(workspace.host_environment(comfyui).folder / "bytecode")  # or it would go into the ComfyUI folder
    _test(session, python, session.posargs[1:], {"COMFYUI_PATH": str(comfyui), "PYTHONPYCACHEPREFIX": bytecode})


@nox.session
def fuzz(session: nox.Session) -> None:
    """Feed 10,000 damaged and absurd inputs to everything that reads any; ``nox -s fuzz -- -k boxes`` feeds a part."""
    environment = {"LUNA_FUZZ": "long", "OMP_NUM_THREADS": "1"}
    session.run(_set_up(session), "-m", "pytest", "tests/fuzz", *session.posargs, env=environment, external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and types."""
    _lint(session, _set_up(session))


@nox.session
def bench(session: nox.Session) -> None:
    """Run the measured comparisons; arguments go to the benchmark script."""
    session.run(_set_up(session), str(ROOT / "benchmarks" / "run.py"), *session.posargs, external=True)


@nox.session
def train(session: nox.Session) -> None:
    """Train the small models of the demo anew (hours; stop at any time, it goes on); see training/README.md."""
    session.run(_set_up(session), str(ROOT / "training" / "run.py"), *session.posargs, external=True)
