# SPDX-License-Identifier: Apache-2.0
"""A headless browser and what is typed into it: the DevTools protocol over pipes, which needs no package."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path


EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--headless=new --remote-debugging-pipe --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)


class Page:
    """One page, as a context.

    Args:
        profile (`Path`): folder for what the browser keeps.
        size (`tuple[int, int]`, defaults to `(900, 900)`): of the window.
    """

    def __init__(self, profile: Path, size: tuple[int, int] = (900, 900), *options: str):
        self._commands, to_browser = os.pipe()
        from_browser, self._answers = os.pipe()
        command = [EXECUTABLE, *OPTIONS.split(), f"--user-data-dir={profile}", "--window-size=%d,%d" % size, *options]
        # The protocol has the file descriptors 3 and 4; bash, as dash knows no numbers above 9.
        shell = ["bash", "-c", f'exec "$@" 3<&{self._commands} 4>&{self._answers}', "bash", *command]
        self._process = subprocess.Popen(shell, pass_fds=(self._commands, self._answers), stderr=subprocess.DEVNULL)
        os.close(self._commands)
        os.close(self._answers)
        self._to, self._from = os.fdopen(to_browser, "wb", 0), os.fdopen(from_browser, "rb")
        self._count, self._session = 0, None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *error):
        self._to.close()  # upon which the browser ends
        self._process.wait(timeout=30)
        self._from.close()

    def send(self, method: str, **parameters) -> dict:
        """The answer to a command of the protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None and not method.startswith("SystemInfo."):
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = b""
            while not answer.endswith(b"\0"):
                if not (byte := self._from.read(1)):
                    raise RuntimeError("the browser ended")
                answer += byte
            answer = json.loads(answer[:-1])
            if answer.get("id") == self._count:  # others are events
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)

    def evaluate(self, expression: str):
        """The value of JavaScript, which may be a promise."""
        result = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"].get("description", expression))
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 60):
        """The value of JavaScript as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"{expression} is {value!r} after {seconds} s")
            time.sleep(0.02)
        return value

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def press(self, key: str) -> None:
        code = {"Tab": 9, "ArrowRight": 39, "Escape": 27}[key]
        for type in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=type, key=key, code=key, windowsVirtualKeyCode=code)
