"""A headless Chromium, driven over its own protocol: open a page, run a line of script, type, read what the console says."""

import json
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-extensions", "--disable-dev-shm-usage", "--hide-scrollbars",
         "--remote-debugging-port=0")


def chromium() -> str | None:
    "The browser's program, or None where there is none."
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def served(folder: Path, prefix: str = "/") -> Iterator[str]:
    "A web server of a folder below `prefix`, as its address; as GitHub's, it answers with 404.html where there is no file."
    class Handler(SimpleHTTPRequestHandler):
        def translate_path(self, path):
            return super().translate_path("/" + path[len(prefix):] if path.startswith(prefix) else "/no/such/file")

        def send_error(self, code, message=None, explain=None):
            body = (folder / "404.html").read_bytes()
            self.send_response(code)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{prefix}"
    finally:
        server.shutdown()
        server.server_close()


class Browser:
    "One tab; a context manager. `problems` holds what the console reported as an error or a warning since the last `open`."

    def __init__(self, timeout: float = 60):
        self.timeout, self.problems, self.number, self.events = timeout, [], 0, []

    def __enter__(self):
        from websocket import create_connection
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.process = subprocess.Popen([chromium(), *FLAGS, f"--user-data-dir={self.profile.name}", "about:blank"],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port, path = self._wait(lambda: self._port())
            self.socket = create_connection(f"ws://127.0.0.1:{port}{path}", timeout=self.timeout, suppress_origin=True)
            self.session = None
            target = self._wait(lambda: next((t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"), None))
            self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.profile.cleanup()

    def _wait(self, what):
        end = time.monotonic() + self.timeout
        while not (found := what()):
            if time.monotonic() > end or self.process.poll() is not None:
                raise RuntimeError("the browser did not start" if self.process.poll() is not None else "the browser did not answer in time")
            time.sleep(0.05)
        return found

    def _port(self) -> list[str] | None:
        file = Path(self.profile.name) / "DevToolsActivePort"
        lines = file.read_text().split() if file.exists() else []
        return lines if len(lines) == 2 else None

    def _read(self) -> dict:
        message = json.loads(self.socket.recv())
        kind, given = message.get("method"), message.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.problems.append(given["exceptionDetails"].get("exception", {}).get("description") or given["exceptionDetails"]["text"])
        elif kind == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning", "assert"):
            self.problems.append(" ".join(str(arg.get("value", arg.get("description"))) for arg in given["args"]))
        elif kind == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{given['entry']['text']} {given['entry'].get('url', '')}")
        elif kind == "Network.requestWillBeSent" and not given["request"]["url"].startswith(("http://127.0.0.1", "file:", "data:", "about:")):
            self.problems.append(f"request to {given['request']['url']}")
        elif kind:
            self.events.append(kind)
        return message

    def call(self, method: str, **params) -> dict:
        "One command of the protocol, and its answer."
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        self.socket.send(json.dumps({**message, "sessionId": self.session} if getattr(self, "session", None) else message))
        while (answer := self._read()).get("id") != self.number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, address: str) -> None:
        "Go to an address, and wait until the page is loaded."
        self.problems.clear()
        self.events.clear()
        answer = self.call("Page.navigate", url=address)
        if "errorText" in answer:
            raise RuntimeError(f"{address}: {answer['errorText']}")
        while "loaderId" in answer and "Page.loadEventFired" not in self.events:
            self._read()

    def run(self, script: str):
        "The value of an expression on the page; a promise is waited for."
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", "the script failed"))
        return answer["result"].get("value")

    def until(self, script: str):
        "The value of an expression, once it is true."
        end = time.monotonic() + self.timeout
        while not (value := self.run(script)):
            if time.monotonic() > end:
                raise AssertionError(f"this never came true on the page: {script}")
            time.sleep(0.05)
        return value

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press(self, key: str) -> None:
        codes = {"Enter": 13, "Escape": 27, "ArrowDown": 40, "Tab": 9}
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=text if kind == "keyDown" else "",
                      windowsVirtualKeyCode=codes.get(key, ord(key[0]) if len(key) == 1 else 0))

    def window(self, width: int, height: int = 900, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
