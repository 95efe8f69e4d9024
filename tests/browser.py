"""A headless Chromium, controlled over its debugging pipe with only the standard library."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome", "chrome-headless-shell")


def find_browser() -> str | None:
    """The first Chromium on the path; None if there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page; `evaluate` runs JavaScript in it. Use as a context manager."""

    def __init__(self, program: str, width: int = 1400, height: int = 900) -> None:
        self._profile = TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        down_read, down_write = os.pipe()
        up_read, up_write = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage"
        # The browser reads commands from descriptor 3 and answers on 4.
        self._process = subprocess.Popen(
            f'exec "{program}" --remote-debugging-pipe {flags} --user-data-dir="{self._profile.name}" '
            f"3<&{down_read} 4>&{up_write}",
            shell=True,
            executable="/bin/bash",
            pass_fds=(down_read, up_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(down_read)
        os.close(up_write)
        self._down, self._up = os.fdopen(down_write, "wb"), os.fdopen(up_read, "rb")
        self._n, self._session, self._rest = 0, "", b""
        self.events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = ""
        self._call("Browser.close")
        self._process.wait(timeout=30)
        self._down.close()
        self._up.close()
        self._profile.cleanup()

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a file, at a fragment such as "#id=3", and wait until it is loaded."""
        self._navigate("about:blank")  # another fragment of the page that is there would not load it
        self._navigate(path.resolve().as_uri() + fragment)

    def _navigate(self, address: str) -> None:
        loaded = self._loads()
        self._call("Page.navigate", url=address)
        while self._loads() == loaded:
            self._receive()

    def _loads(self) -> int:
        return sum(event.get("method") == "Page.loadEventFired" for event in self.events)

    def evaluate(self, script: str) -> Any:
        """The value of an expression; a script error fails the test."""
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def click(self, script: str) -> None:
        """Press and release the left button in the middle of an element, given as an expression; it scrolls there."""
        for kind in ("mousePressed", "mouseReleased"):
            self._mouse(kind, *self._middle(script), button="left", buttons=1, clickCount=1)

    def wheel(self, script: str, down_px: int) -> None:
        """Turn the wheel over the middle of an element."""
        self._mouse("mouseWheel", *self._middle(script), deltaX=0, deltaY=down_px)

    def drag(self, script: str, right_px: int, down_px: int) -> None:
        """Press in the middle of an element, move, and release."""
        x, y = self._middle(script)
        self._mouse("mousePressed", x, y, button="left", buttons=1, clickCount=1)
        self._mouse("mouseMoved", x + right_px, y + down_px, button="left", buttons=1)
        self._mouse("mouseReleased", x + right_px, y + down_px, button="left", buttons=1, clickCount=1)

    def _middle(self, script: str) -> tuple[float, float]:
        found = f"{{ const e = {script}; e.scrollIntoView({{block: 'nearest'}}); const r = e.getBoundingClientRect();"
        x, y = self.evaluate(f"{found} [r.x + r.width / 2, r.y + r.height / 2] }}")
        return x, y

    def _mouse(self, kind: str, x: float, y: float, **how: Any) -> None:
        self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **how)

    def screenshot(self, path: Path) -> None:
        """A screenshot of the page."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def requests(self) -> list[str]:
        """Every URL that the page requested."""
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def problems(self) -> list[dict[str, Any]]:
        """Uncaught errors and messages of level error."""
        return [
            event
            for event in self.events
            if event.get("method") == "Runtime.exceptionThrown"
            or (event.get("method") == "Log.entryAdded" and event["params"]["entry"]["level"] == "error")
        ]

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._n += 1
        message: dict[str, Any] = {"id": self._n, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._down.write(json.dumps(message).encode() + b"\0")
        self._down.flush()
        while True:
            answer = self._receive()
            if answer.get("id") == self._n:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = os.read(self._up.fileno(), 1 << 16)
            assert chunk, "the browser closed its pipe"
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\0")
        answer: dict[str, Any] = json.loads(line)
        if "method" in answer:
            self.events.append(answer)
        return answer
