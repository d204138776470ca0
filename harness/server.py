"""A real ComfyUI server as a child process, and a client for its HTTP and websocket interface."""

import json
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import websocket
from PIL import Image

from harness import workspace

Graph = dict[str, dict[str, Any]]
Event = tuple[str, dict[str, Any]]

_START_TIMEOUT_S = 240.0
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_IMPORT_TIME = re.compile(
    r"(\[\w+\])?\s*(?P<seconds>[\d.]+) seconds(?P<failed> \(IMPORT FAILED\))?: (?P<folder>.*)$"
)  # newer releases begin each line with its level
_PREVIEW_EVENTS = (1, 4)  # binary message kinds: a preview, a preview with metadata before it


class ServerError(RuntimeError):
    """The server did not start, refused a graph, or a node of the graph failed; the text quotes its message."""


class InterruptedByUser(ServerError):
    """The run was stopped by ``interrupt``."""


@dataclass
class Run:
    """What a queued graph did: every websocket message, the previews, and the images it saved."""

    prompt_id: str
    events: list[Event] = field(default_factory=list)
    previews: list[Image.Image] = field(default_factory=list)
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0

    def progress(self, node_id: str) -> list[tuple[int, int]]:
        """(value, max) of every progress message of a node, in order."""
        return [(d["value"], d["max"]) for kind, d in self.events if kind == "progress" and str(d["node"]) == node_id]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ComfyServer:
    """Starts ``main.py`` of a ComfyUI folder with its own base directory; a context manager."""

    def __init__(self, comfyui: Path, base: Path, port: int | None = None, packages: Path | None = None) -> None:
        """``packages`` is a folder of Python packages that this server prefers to those of the environment."""
        self.comfyui = comfyui
        self.base = base
        self.port = port or free_port()
        self.packages = packages
        self.log_path = base / f"server-{self.port}.log"
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "ComfyServer":
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the server and waits for its first answer; raises ServerError with the end of its log without one."""
        # Newer releases log into the working directory, and older ones cannot read a newer one's database.
        self._scratch = tempfile.TemporaryDirectory(prefix="luna-server-", ignore_cleanup_errors=True)
        scratch = Path(self._scratch.name)
        command = [sys.executable, str(self.comfyui.resolve() / "main.py"), "--base-directory", str(self.base)]
        command += ["--port", str(self.port), "--disable-auto-launch", "--preview-method", "latent2rgb"]
        command += ["--database-url", f"sqlite:///{(scratch / 'comfyui.db').as_posix()}"]
        if not _has_cuda():
            command += ["--cpu", "--use-pytorch-cross-attention"]
        (self.base / "user").mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        if self.packages is not None:
            environment["PYTHONPATH"] = str(self.packages)
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None:
                raise ServerError(
                    f"the server ended with {self._process.returncode} while starting:\n{self._log_end()}"
                )
            if time.monotonic() > deadline:
                self.stop()
                raise ServerError(f"no answer from the server after {_START_TIMEOUT_S:.0f} s:\n{self._log_end()}")
            time.sleep(0.2)

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def wait(self) -> None:
        """Blocks until the server ends by itself or by Ctrl+C."""
        if self._process is not None:
            self._process.wait()

    def log(self) -> str:
        """What the server has written, without colours."""
        return _COLOUR.sub("", self.log_path.read_text(encoding="utf-8", errors="replace"))

    def log_about(self, word: str) -> list[str]:
        """Lines of the log that hold a word, apart from import times and from the names of the folders in use."""
        log = self.log()
        folders = {self.base, self.comfyui, Path(sys.prefix), workspace.ROOT}
        for folder in sorted((str(f) for given in folders for f in (given, given.resolve())), key=len, reverse=True):
            log = log.replace(folder, "")
        return [line for line in log.splitlines() if word in line.lower() and not _IMPORT_TIME.match(line)]

    def pack_import_seconds(self, pack: str) -> float:
        """The import time that ComfyUI itself reports for a pack; raises ServerError where the import failed."""
        for match in map(_IMPORT_TIME.match, self.log().splitlines()):
            if match is not None and not match["failed"] and re.split(r"[/\\]", match["folder"])[-1] == pack:
                return float(match["seconds"])
        raise ServerError(f"the pack {pack} was not imported:\n{self._log_end()}")

    def get(self, path: str) -> Any:
        return json.loads(self.get_bytes(path))

    def get_bytes(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return bytes(answer.read())

    def post(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """POSTs JSON; raises ServerError with the server's own words where it answers with an error."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body or {}).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            raise ServerError(f"{path}: HTTP {error.code}: {error.read().decode(errors='replace')}") from error

    def interrupt(self) -> None:
        self.post("/interrupt")

    def image(self, reference: dict[str, str]) -> Image.Image:
        """An output picture by the reference that a node's output holds (filename, subfolder, type)."""
        return Image.open(BytesIO(self.get_bytes("/view?" + urllib.parse.urlencode(reference)))).convert("RGB")

    def run(
        self, graph: Graph, on_event: Callable[[str, dict[str, Any]], None] | None = None, timeout_s: float = 900.0
    ) -> Run:
        """Queues an API graph and follows it to its end.

        ``on_event(kind, data)`` sees every message of this run, previews as ("preview", {"image": picture}).
        Raises InterruptedByUser where it was interrupted, and ServerError where the graph was refused or a node failed.
        """
        client_id = uuid.uuid4().hex
        socket_ = websocket.WebSocket()
        socket_.connect(f"ws://127.0.0.1:{self.port}/ws?clientId={client_id}", timeout=timeout_s)
        start = time.perf_counter()
        try:
            run = Run(json.loads(self.post("/prompt", {"prompt": graph, "client_id": client_id}))["prompt_id"])
            self._follow(socket_, run, on_event or (lambda kind, data: None), time.monotonic() + timeout_s)
        finally:
            socket_.close()
        run.seconds = time.perf_counter() - start
        run.outputs = self.get(f"/history/{run.prompt_id}")[run.prompt_id]["outputs"]
        return run

    def _follow(
        self, socket_: websocket.WebSocket, run: Run, on_event: Callable[[str, dict[str, Any]], None], deadline: float
    ) -> None:
        while True:
            socket_.settimeout(max(1.0, deadline - time.monotonic()))
            message = socket_.recv()
            if isinstance(message, bytes):
                picture = _preview(message)
                if picture is not None:
                    run.previews.append(picture)
                    on_event("preview", {"image": picture})
                continue
            kind, data = (parsed := json.loads(message))["type"], parsed["data"]
            if data.get("prompt_id") != run.prompt_id:
                continue
            run.events.append((kind, data))
            on_event(kind, data)
            if kind == "execution_error":
                raise ServerError(f"{data['node_type']}: {data['exception_type']}: {data['exception_message'].strip()}")
            if kind == "execution_interrupted":
                raise InterruptedByUser(f"interrupted in node {data['node_id']}")
            if kind == "executing" and data["node"] is None:
                return

    def _answers(self) -> bool:
        try:
            self.get("/system_stats")
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False
        return True

    def _log_end(self) -> str:
        return self.log()[-4000:]


def _preview(message: bytes) -> Image.Image | None:
    """The picture in a binary message: event kind, image kind (or length of metadata, metadata), picture."""
    (kind,) = struct.unpack(">I", message[:4])
    if kind not in _PREVIEW_EVENTS:
        return None
    (second,) = struct.unpack(">I", message[4:8])
    start = 8 if kind == 1 else 8 + second
    return Image.open(BytesIO(message[start:])).convert("RGB")


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
