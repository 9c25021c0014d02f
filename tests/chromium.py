"""A page in headless Chromium, over the DevTools protocol: what it shows, the keys that are pressed, what it complains of."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Chromium:
    """A page, over the DevTools protocol."""

    def __init__(self, folder: Path, width: int = 1280, height: int = 900):
        from websockets.sync import client

        options = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-port=0",
            f"--window-size={width},{height}",
        ]
        self.process = subprocess.Popen(
            [str(CHROMIUM), *options, f"--user-data-dir={folder}", "about:blank"], stderr=subprocess.DEVNULL
        )
        until = time.time() + 60
        while not (folder / "DevToolsActivePort").exists() and time.time() < until:
            time.sleep(0.05)
        time.sleep(0.2)
        port, path = (folder / "DevToolsActivePort").read_text().split()
        self.stack = contextlib.ExitStack()
        self.socket = self.stack.enter_context(client.connect(f"ws://127.0.0.1:{port}{path}", max_size=None, ping_interval=None))
        self.numbers, self.events, self.session = itertools.count(), [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv(timeout=30))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def run(self, script: str):
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 20) -> None:
        """Also until htmx has taken hold of what it put in: until then a click is lost."""
        until = time.time() + seconds
        while not self.run(f"!!(document.body && !document.querySelector('.htmx-added') && ({condition}))"):
            assert time.time() < until, f"{condition}: {self.run('document.body.innerText')[:500]}"
            time.sleep(0.05)

    def go(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait(f"location.href.startsWith('{address}'.split('/join')[0]) && document.readyState === 'complete'")

    def key(self, key: str, modifiers: int = 0) -> None:
        """``modifiers`` are the sum of 2 for Control and 8 for Shift."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "End": 35, "ArrowLeft": 37}
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        common = {"key": key, "modifiers": modifiers, "windowsVirtualKeyCode": codes.get(key, ord(key[0].upper()))}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text and not modifiers else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def tab(self, condition: str, modifiers: int = 0) -> None:
        """Tab (with 8: backwards) until the condition holds of ``e``, the element that has the focus."""
        for _ in range(100):
            if self.run(f"((e) => {condition})(document.activeElement)"):
                return
            self.key("Tab", modifiers)
        raise AssertionError(f"no key leads to {condition}")

    def write(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def picture(self, file: Path, whole: bool = True) -> None:
        """Of the whole page, or of what the screen shows of it."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))

    def problems(self) -> list[str]:
        """What the browser refused or complained of, and whom it asked."""
        found = []
        for event in self.events:
            if event["method"] == "Log.entryAdded":
                found.append(event["params"]["entry"]["text"])
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(event["params"]["exceptionDetails"])[:300])
        return found

    def hosts(self) -> set[str]:
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return {url.split("/")[2].split(":")[0] for url in asked if url.startswith("http")}

    def close(self) -> None:
        self.stack.close()
        self.process.terminate()
        self.process.wait(20)
