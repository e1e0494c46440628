# SPDX-License-Identifier: Apache-2.0
"""Speed of the engine in headless Chromium, on the one thread of a page.

    taskset -c 0 python examples/research/browser.py stlm-3m.gguf stlm.gguf

As in `llamacpp.py`: a prompt of 1,024 bytes, then 256 bytes are written. Every figure is bytes per CPU second of the process
of the page, median (lowest-highest) over the repeats, of which each does this `ROUNDS` times; one more comes first, in which
the browser compiles. The last line is one JSON document.

[`Page`] is a browser for tests, too: the DevTools protocol over pipes, which needs no package.
"""

import argparse
import http.server
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path


sys.path.append(str(Path(__file__).parents[1]))  # the examples

from inputs import at_least_one


EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = (
    "--headless=new --remote-debugging-pipe --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)
PROMPT_BYTES, NEW_BYTES, ROUNDS = 1024, 256, 30
FOLDER = Path(__file__).parents[1]


class Page:
    """One page, as a context.

    Args:
        profile (`Path`): folder for what the browser keeps.
        size (`tuple[int, int]`, defaults to `(900, 900)`): of the window.
    """

    def __init__(self, profile: Path, size: tuple[int, int] = (900, 900)):
        self._commands, to_browser = os.pipe()
        from_browser, self._answers = os.pipe()
        window = f"--window-size={size[0]},{size[1]}"
        command = [EXECUTABLE, *OPTIONS.split(), f"--user-data-dir={profile}", window]
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

    def cpu_seconds(self) -> float:
        """CPU time of all processes of pages so far."""
        processes = self.send("SystemInfo.getProcessInfo")["processInfo"]
        return sum(process["cpuTime"] for process in processes if process["type"] == "renderer")

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def press(self, key: str) -> None:
        code = {"Tab": 9, "ArrowRight": 39, "Escape": 27}[key]
        for type in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=type, key=key, code=key, windowsVirtualKeyCode=code)


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def measure(page: Page, repeats: int) -> dict[str, list[float]]:
    """Bytes per CPU second of `engine` in `page`, of the prompt and of what is written."""
    calls = {
        "prompt": ("engine.prompt(''), engine.prompt(prompt)", PROMPT_BYTES),
        "written": (f"engine.generate(prompt, {NEW_BYTES})", NEW_BYTES),
    }
    speeds = {name: [] for name in calls}
    for _ in range(1 + repeats):
        for name, (call, count) in calls.items():
            start = page.cpu_seconds()
            page.evaluate(f"for (let i = 0; i < {ROUNDS}; i++) {call}")
            speeds[name].append(ROUNDS * count / (page.cpu_seconds() - start))
    return {name: values[1:] for name, values in speeds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="files that the engine reads")
    parser.add_argument("--repeats", type=at_least_one, default=5)
    args = parser.parse_args()
    prompt = (FOLDER / "data" / "shakespeare.txt").read_bytes()[:PROMPT_BYTES]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder) / "site"
        shutil.copytree(FOLDER / "browser", site)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=site))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print("| model | MB | written bytes/s | prompt bytes/s |\n|---|---|---|---|")
        for model in args.models:
            shutil.copy(model, site / "model.gguf")
            with Page(Path(folder) / "profile") as page:
                page.open(f"http://127.0.0.1:{server.server_port}/index.html")
                page.wait("document.readyState === 'complete'")
                page.evaluate(
                    "(async () => { const { Engine } = await import('/stlm/stlm.mjs');"
                    f"globalThis.prompt = Uint8Array.from({list(prompt)});"
                    "globalThis.engine = await Engine.load('/model.gguf'); })()"
                )
                speeds = results[model.stem] = measure(page, args.repeats)
            cells = [
                f"{statistics.median(a):,.0f} ({min(a):,.0f}-{max(a):,.0f})"
                for a in map(speeds.get, ("written", "prompt"))
            ]
            print(f"| {model.stem} | {model.stat().st_size / 1e6:.2f} | {cells[0]} | {cells[1]} |", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
