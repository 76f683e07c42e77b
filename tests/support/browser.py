"""A headless Chromium, driven by its DevTools protocol through a pipe: no server, no port, no further package."""

from __future__ import annotations

import base64
import json
import os
import selectors
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
"""The program; None where none is installed."""
_PATIENCE = 60
_KEYS = {"ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "ArrowUp": 38, "Home": 36, "End": 35, "Escape": 27}
_START = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for number, end in zip((3, 4), ends):  # Chromium reads its orders from 3, and answers on 4
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One browser with one page. Use as a context."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 900):
        self._profile, self._size = profile, (width, height)
        self._number = 0
        self._received = b""
        self._session = ""
        self.complaints: list[str] = []
        """Uncaught exceptions, and what is logged as an error or a warning; blocked resources are."""
        self.requests: list[str] = []
        """Addresses that were asked for."""
        self.refused: list[str] = []
        """Those of them that the page's own policy did not let pass."""
        self._asked: dict[str, str] = {}

    def __enter__(self) -> Browser:
        to_browser, self._to = os.pipe()
        self._from, from_browser = os.pipe()
        assert CHROMIUM
        command = [
            *(sys.executable, "-c", _START, str(to_browser), str(from_browser), CHROMIUM),
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--remote-debugging-pipe", f"--user-data-dir={self._profile}", "--hide-scrollbars", "about:blank"),
        ]
        self._process = subprocess.Popen(
            command, pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_browser)
        os.close(from_browser)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._from, selectors.EVENT_READ)
        pages = [info for info in self._call("Target.getTargets")["targetInfos"] if info["type"] == "page"]
        target = pages[0]["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        width, height = self._size
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(_PATIENCE)
        self._selector.close()
        os.close(self._to)
        os.close(self._from)

    def open(self, file: Path) -> None:
        """Load a file and wait until it has run."""
        self._call("Page.navigate", url=file.resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def dark(self, is_dark: bool) -> None:
        """Say which colour scheme the user prefers."""
        value = "dark" if is_dark else "light"
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": value}])

    def value(self, expression: str) -> Any:
        """Return the value of an expression of JavaScript on the page."""
        done = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression is true."""
        until = time.monotonic() + _PATIENCE
        while not self.value(condition):
            assert time.monotonic() < until, f"in vain: {condition}"
            time.sleep(0.02)

    def click(self, selector: str) -> None:
        """Click into the middle of an element's first line."""
        x, y = self.hover(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, selector: str) -> tuple[float, float]:
        """Move the mouse there."""
        box = self.value(
            f"(async () => {{ const found = document.querySelector({json.dumps(selector)});"
            "found.scrollIntoView({block: 'nearest'});"
            "for (let frame = 0; frame < 3; frame++) await new Promise(requestAnimationFrame);"  # to have scrolled
            "const box = found.getClientRects()[0];"
            "return [box.left + box.width / 2, box.top + box.height / 2]; })()"
        )
        self._call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])
        return box[0], box[1]

    def press(self, key: str) -> None:
        """Press and release a key."""
        for kind in ("rawKeyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEYS[key])

    def screenshot(self, file: Path, full: bool = False) -> None:
        """Save what is seen, or the whole page, as a PNG."""
        done = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=full, **self._clip(full))
        file.write_bytes(base64.b64decode(done["data"]))

    def _clip(self, full: bool) -> dict[str, Any]:
        if not full:
            return {}
        height = self.value("document.documentElement.scrollHeight")
        return {"clip": {"x": 0, "y": 0, "width": self._size[0], "height": height, "scale": 1}}

    def _call(self, method: str, **params: Any) -> Any:
        """Call a method of the protocol and return its result; take note of events that come before it."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next(method)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._take_event(answer.get("method"), answer.get("params", {}))

    def _next(self, method: str) -> dict[str, Any]:
        while b"\0" not in self._received:
            assert self._selector.select(_PATIENCE), f"{method}: no answer"
            part = os.read(self._from, 1 << 20)
            assert part, f"{method}: the browser has ended"
            self._received += part
        line, _, self._received = self._received.partition(b"\0")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _take_event(self, name: str | None, params: dict[str, Any]) -> None:
        if name == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif name == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(params["args"]))
        elif name == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])
        elif name == "Network.requestWillBeSent":
            self._asked[params["requestId"]] = params["request"]["url"]
            self.requests.append(params["request"]["url"])
        elif name == "Network.loadingFailed" and params.get("blockedReason") == "csp":
            self.refused.append(self._asked[params["requestId"]])
