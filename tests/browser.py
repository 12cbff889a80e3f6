"""Headless Chromium, driven over a pipe by its DevTools protocol: no package is needed."""

import base64
import contextlib
import fcntl
import json
import os
import shutil
import time

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """One page of a browser; `with Browser(folder, width, height) as page`."""

    def __init__(self, folder, width: int, height: int):
        (read, self._out), (self._in, write) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 100) for end in (read, write)]
        null = [(os.POSIX_SPAWN_OPEN, i, os.devnull, os.O_RDWR, 0) for i in (0, 1, 2)]
        options = (
            "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --no-first-run "
            f"--user-data-dir={folder} --window-size={width},{height} about:blank"
        )
        self._process = os.posix_spawn(
            BROWSER, [BROWSER, *options.split()], os.environ,
            file_actions=[*null, *((os.POSIX_SPAWN_DUP2, end, i) for i, end in enumerate(theirs, 3))],
        )  # fmt: skip
        for end in (read, write, *theirs):
            os.close(end)
        self._number, self._buffer, self._session = 0, b"", None
        self.events: list[dict] = []
        target = self.call("Target.getTargets")["targetInfos"][0]["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=width < 600,
        )  # fmt: skip

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error) -> None:
        self._session = None
        with contextlib.suppress(EOFError):
            self.call("Browser.close")
        os.waitpid(self._process, 0)
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, **params) -> dict:
        """Returns what the browser answers to a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict:
        while b"\0" not in self._buffer:
            read = os.read(self._in, 65536)
            if not read:
                raise EOFError("the browser has gone")
            self._buffer += read
        text, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(text)

    def run(self, script: str):
        """Returns the value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script: str):
        """Waits until an expression is true, and returns it; fails after half a minute."""
        for _ in range(600):
            # A page that is being loaded lacks what the expression names.
            if value := self.run(
                f"(() => {{ try {{ return {script} }} catch {{ return null }} }})()"
            ):
                return value
            time.sleep(0.05)
        raise AssertionError(
            f"never true: {script}; the page says {self.run('document.body.innerText')}"
        )

    def choose(self, selector: str, *files) -> None:
        """Chooses files in an input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def keys(self, text: str) -> None:
        """Types a text, and then Enter."""
        self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key="Enter",
                code="Enter",
                text="\r",
                windowsVirtualKeyCode=13,
            )

    def picture(self, file) -> None:
        """Saves what the page looks like, whole, as a PNG file."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))
