"""A headless Chromium that opens one page at a time, driven over the DevTools protocol."""

import base64
import io
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import websocket
from PIL import Image

EXECUTABLES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

_START_TIMEOUT_S = 60.0
_ARGUMENTS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-dev-shm-usage",  # containers often give /dev/shm too little room
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--mute-audio",
    "--lang=en-US",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # the page reaches its own server alone
    "--remote-debugging-port=0",
)


class BrowserError(RuntimeError):
    """The browser is missing, did not start or did not answer, or a script in the page failed."""


def find_chromium() -> str | None:
    """Path of an installed Chromium or Chrome, None without one."""
    return next((path for path in map(shutil.which, EXECUTABLES) if path), None)


class Browser:
    """One page of a headless Chromium with a profile of its own; a context manager.

    ``errors`` collects what the page wrote to the console as an error, uncaught exceptions, and failed requests of
    ``origin``; failures to reach any other host are no fault of the page under test.
    """

    def __init__(self, origin: str, width: int = 1600, height: int = 900) -> None:
        """``origin`` is the server under test, such as http://127.0.0.1:8188; width and height are the page's px."""
        self.origin = origin
        self.size = (width, height)
        self.errors: list[str] = []
        self._ids = itertools.count(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: websocket.WebSocket | None = None
        self._profile: Path | None = None

    def __enter__(self) -> "Browser":
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._profile is not None:
            shutil.rmtree(self._profile, ignore_errors=True)  # Chromium's helpers may still write for a moment
            self._profile = None

    def open(self, path: str = "/", timeout_s: float = 60.0) -> None:
        """Loads a page of ``origin`` and waits until the document is complete."""
        answer = self.command("Page.navigate", url=self.origin + path)
        if answer.get("errorText"):
            raise BrowserError(f"{self.origin + path}: {answer['errorText']}")
        self.wait_for("document.readyState === 'complete'", timeout_s)

    def evaluate(self, script: str, timeout_s: float = 60.0) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise; raises BrowserError with its exception."""
        answer = self.command(
            "Runtime.evaluate",
            timeout_s,
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        if "exceptionDetails" in answer:
            raise BrowserError(f"{_exception(answer['exceptionDetails'])}\nin: {script[:400]}")
        return answer["result"].get("value")

    def call(self, function: str, *arguments: Any, timeout_s: float = 60.0) -> Any:
        """Calls a JavaScript function, given as its source, with JSON arguments."""
        return self.evaluate(f"({function})({', '.join(map(json.dumps, arguments))})", timeout_s)

    def wait_for(self, condition: str, timeout_s: float = 60.0) -> None:
        """Waits until a JavaScript expression is true; raises BrowserError after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while not self.evaluate(f"!!({condition})"):
            if time.monotonic() > deadline:
                raise BrowserError(f"not so after {timeout_s:.0f} s: {condition}\nconsole: {self.errors}")
            time.sleep(0.1)

    def screenshot(self) -> Image.Image:
        """What the page shows."""
        png = base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"])
        return Image.open(io.BytesIO(png)).convert("RGB")

    def command(self, method: str, timeout_s: float = 60.0, **parameters: Any) -> dict[str, Any]:
        """One DevTools command and its result; events that arrive meanwhile are read for errors."""
        if self._socket is None:
            raise BrowserError("the browser is not running: use it as a context manager")
        identifier = next(self._ids)
        self._socket.send(json.dumps({"id": identifier, "method": method, "params": parameters}))
        deadline = time.monotonic() + timeout_s
        while True:
            self._socket.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                message = json.loads(self._socket.recv())
            except websocket.WebSocketTimeoutException as error:
                raise BrowserError(f"{method}: no answer after {timeout_s:.0f} s") from error
            if message.get("id") == identifier:
                if "error" in message:
                    raise BrowserError(f"{method}: {message['error']['message']}")
                return dict(message["result"])
            self._note(message)

    def _start(self) -> None:
        executable = find_chromium()
        if executable is None:
            raise BrowserError(
                f"no Chromium found (looked for {', '.join(EXECUTABLES)}): install it, on Debian and Ubuntu as the "
                "package chromium"
            )
        self._profile = Path(tempfile.mkdtemp(prefix="luna-browser-"))
        command = [executable, *_ARGUMENTS, f"--user-data-dir={self._profile}", f"--window-size={_comma(self.size)}"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.append("--no-sandbox")  # Chromium's sandbox refuses to run as root
        with (self._profile / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "about:blank"], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self._socket = websocket.create_connection(
            self._page_address(), timeout=_START_TIMEOUT_S, suppress_origin=True, enable_multithread=False
        )
        for domain in ("Page", "Runtime", "Log"):
            self.command(f"{domain}.enable")
        width, height = self.size
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def _page_address(self) -> str:
        """The websocket address of the first page, once Chromium has written its port into the profile."""
        assert self._profile is not None
        assert self._process is not None
        port_file = self._profile / "DevToolsActivePort"
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            lines = port_file.read_text(encoding="utf-8").splitlines() if port_file.is_file() else []
            if lines:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list", timeout=10) as answer:
                        targets = json.load(answer)
                except urllib.error.URLError:
                    targets = []
                pages = [target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page"]
                if pages:
                    return str(pages[0])
            time.sleep(0.1)
        log = (self._profile / "chromium.log").read_text(encoding="utf-8", errors="replace")
        raise BrowserError(f"Chromium did not start:\n{log[-2000:]}")

    def _note(self, message: dict[str, Any]) -> None:
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(_exception(parameters["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "assert"):
            self.errors.append(" ".join(_text(argument) for argument in parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            entry = parameters["entry"]
            if entry["source"] != "network" or entry.get("url", "").startswith(self.origin):
                self.errors.append(f"{entry['text']} ({entry.get('url', '')})")


def _comma(numbers: tuple[int, int]) -> str:
    return ",".join(map(str, numbers))


def _text(argument: dict[str, Any]) -> str:
    return str(argument.get("value", argument.get("description", argument.get("type"))))


def _exception(details: dict[str, Any]) -> str:
    return str(details.get("exception", {}).get("description") or details["text"])
