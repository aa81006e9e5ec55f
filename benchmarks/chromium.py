"""A headless Chromium for pages of ours: opens a file, runs JavaScript in it, takes a picture.

    with Chromium() as browser:
        browser.open(Path("report.html"))
        browser.run("document.title")

Speaks the DevTools protocol over a pair of pipes, so no port is opened and no package is needed.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
         "--disable-background-networking", "--hide-scrollbars")  # fmt: skip
ANSWERED_WITHIN = 60.0  # seconds


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One page. `messages`: what the page has said on its console, and what the browser has refused, as texts."""

    def __init__(self, width: int = 1280, height: int = 900) -> None:
        self._size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.messages: list[str] = []
        self.requests: list[str] = []
        self._number, self._session = 0, ""
        self._rest = b""

    def __enter__(self) -> "Chromium":
        path = find_chromium()
        assert path, "no Chromium on this machine"
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()

        def pipes() -> None:  # the protocol's numbers: 3 is read by the browser, 4 is written
            os.dup2(to_browser, 100)
            os.dup2(from_browser, 101)
            os.dup2(100, 3)
            os.dup2(101, 4)

        command = [path, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(command, preexec_fn=pipes, close_fds=False, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self._call("Emulation.setDeviceMetricsOverride", self._size)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            os.close(self._write)
            os.close(self._read)
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._profile.cleanup()

    def open(self, file: Path) -> None:
        """Returns when the page says that it is ready, by `data-ready` on its root."""
        self._call("Page.navigate", {"url": file.absolute().as_uri()})
        self.wait_for("document.documentElement.dataset.ready")

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise, as JSON has it."""
        asked = {"expression": expression, "awaitPromise": True, "returnByValue": True, "userGesture": True}
        said = self._call("Runtime.evaluate", asked)
        if "exceptionDetails" in said:
            raise RuntimeError(said["exceptionDetails"].get("exception", said["exceptionDetails"]).get("description"))
        return said["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        end = time.monotonic() + ANSWERED_WITHIN
        while time.monotonic() < end:
            with suppress(RuntimeError):  # the page is being replaced
                if found := self.run(expression):
                    return found
            time.sleep(0.02)
        raise TimeoutError(f"never true: {expression}; the page said: {self.messages}")

    def dark(self, is_dark: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}]
        self._call("Emulation.setEmulatedMedia", {"features": features})

    def picture(self, file: Path) -> None:
        """What is visible, as PNG."""
        said = self._call("Page.captureScreenshot", {"format": "png"})
        file.write_bytes(base64.b64decode(said["data"]))

    def pdf(self) -> bytes:
        return base64.b64decode(self._call("Page.printToPDF", {"printBackground": True})["data"])

    def _call(self, method: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters or {}}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (said := self._next()).get("id") != self._number:
            self._note(said)
        if "error" in said:
            raise RuntimeError(f"{method}: {said['error']}")
        return said["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._read, 2**16)
            if not piece:
                raise RuntimeError("Chromium has ended")
            self._rest += piece
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def _note(self, event: Mapping[str, Any]) -> None:
        method, values = event.get("method"), event.get("params", {})
        if method == "Runtime.consoleAPICalled":
            self.messages.append(" ".join(str(one.get("value")) for one in values["args"]))
        elif method == "Runtime.exceptionThrown":
            self.messages.append(json.dumps(values["exceptionDetails"])[:2000])
        elif method == "Log.entryAdded":
            self.messages.append(values["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"][:100])
