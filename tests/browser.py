"""A headless Chromium, steered through its DevTools protocol."""

import json
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
from websockets.sync.client import connect

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0",
    "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
]  # fmt: skip


class Browser:
    """One page, and what a person does on it."""

    def __init__(self, program: str, profile: Path, microphone: Path):
        command = [program, *FLAGS, f"--user-data-dir={profile}", f"--use-file-for-fake-audio-capture={microphone}"]
        self.process = subprocess.Popen([*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addresses, self._n = [], 0  # what the page has asked for
        port = wait_for(lambda: (profile / "DevToolsActivePort").read_text().split()[0], FileNotFoundError, IndexError)
        [page] = [one for one in httpx.get(f"http://127.0.0.1:{port}/json").json() if one["type"] == "page"]
        self._closing = ExitStack()
        self._socket = self._closing.enter_context(connect(page["webSocketDebuggerUrl"], max_size=None))
        for domain in ("Page", "Network", "DOM", "Accessibility"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        """One command of the protocol, and its result."""
        self._n += 1
        self._socket.send(json.dumps({"id": self._n, "method": method, "params": parameters}))
        while (message := json.loads(self._socket.recv(60))).get("id") != self._n:
            if message.get("method") == "Network.requestWillBeSent":
                self.addresses.append(message["params"]["request"]["url"])
        assert "error" not in message, message
        return message["result"]

    def js(self, expression: str):
        """The value of an expression on the page."""
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def until(self, expression: str, seconds: float = 60):
        """Wait until an expression is true, and return its value."""
        return wait_for(lambda: self.js(expression) or 1 / 0, ZeroDivisionError, seconds=seconds)

    def press(self, key: str, number: int, text: str = "") -> None:
        """Press and release a key, by its name and number."""
        for kind in ("keyDown", "keyUp"):
            typed = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=number, **typed)

    def choose(self, selector: str, path: Path) -> None:
        """Choose a file in a field."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        field = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=field, files=[str(path)])

    def spoken(self) -> list[tuple[str, str]]:
        """Role and name of everything a screen reader meets."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        shown = [node for node in nodes if not node.get("ignored")]
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in shown]

    def close(self) -> None:
        """End it."""
        self._closing.close()
        self.process.terminate()
        self.process.wait(20)


def wait_for(value, *errors, seconds: float = 60):
    """What a function gives once it no longer raises."""
    end = time.monotonic() + seconds
    while True:
        try:
            return value()
        except errors:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
