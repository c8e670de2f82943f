"""A headless Chromium, driven over its DevTools protocol: what a page does when it is opened, not what its source says.

Only what these tests need, on aiohttp, which the package has anyway; a browser that tests bring along would be 150 MB.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
START_SECONDS = 60.0
CALL_SECONDS = 60.0


def find_chromium() -> str | None:
    """The browser's program, None where there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page of one browser; a context manager.

    Attributes:
        requests: addresses that the page asked for since `open`.
        complaints: what it wrote to the console as an error, and exceptions nobody caught.
    """

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future] = {}
        self._loaded = asyncio.Event()

    def __enter__(self) -> Browser:
        self._profile = tempfile.TemporaryDirectory(prefix="spice-browser-", ignore_cleanup_errors=True)
        command = [
            find_chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--hide-scrollbars", "--remote-debugging-port=0", f"--user-data-dir={self._profile.name}",
            "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            self._run(self._connect())
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._reader.cancel()
        self._run(asyncio.wait([self._reader]))
        self._run(self._session.close())
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._loop.close()
        self._profile.cleanup()

    def open(self, path: Path) -> float:
        """Shows a file and waits until it is loaded and painted; returns seconds."""
        self.requests.clear()
        self.complaints.clear()
        self._loaded.clear()
        began = time.perf_counter()
        self._run(self._call("Page.navigate", url=path.resolve().as_uri()))
        self._run(asyncio.wait_for(self._loaded.wait(), CALL_SECONDS))
        self.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
        return time.perf_counter() - began

    def evaluate(self, script: str) -> object:
        """The value of an expression in the page, a promise's when it is there.

        Raises:
            RuntimeError: the script fails.
        """
        answer = self._run(self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True))
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"].get("exception", answer["exceptionDetails"])))
        return answer["result"].get("value")

    def wait_for(self, script: str, seconds: float = 20.0) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(script):
            assert time.monotonic() < end, f"not within {seconds} s: {script}"
            time.sleep(0.05)

    def look(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Sets the window's size, in CSS pixels, and the preferred colours; a narrow one is a phone's."""
        phone = width < 600
        self._run(self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone))
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._run(self._call("Emulation.setEmulatedMedia", features=scheme))

    def press(self, key: str, code: int) -> None:
        """Presses and releases a key, such as ("ArrowLeft", 37)."""
        for kind in ("rawKeyDown", "keyUp"):
            self._run(self._call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code))

    def _run(self, awaitable):
        return self._loop.run_until_complete(awaitable)

    async def _connect(self) -> None:
        port_file, end = Path(self._profile.name) / "DevToolsActivePort", time.monotonic() + START_SECONDS
        while not port_file.is_file() or not port_file.read_text().strip():
            assert self._process.poll() is None, f"Chromium ended with {self._process.returncode}"
            assert time.monotonic() < end, f"Chromium did not start within {START_SECONDS} s"
            await asyncio.sleep(0.05)
        port = port_file.read_text().splitlines()[0]
        self._session = aiohttp.ClientSession()
        async with self._session.get(f"http://127.0.0.1:{port}/json/list") as reply:
            target = next(page for page in await reply.json() if page["type"] == "page")
        self._socket = await self._session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)
        self._reader = self._loop.create_task(self._read())
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self._call(f"{domain}.enable")

    async def _call(self, method: str, **parameters: object) -> dict:
        number = next(self._ids)
        future = self._waiting[number] = self._loop.create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        reply = await asyncio.wait_for(future, CALL_SECONDS)
        del self._waiting[number]
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']}")
        return reply["result"]

    async def _read(self) -> None:
        async for message in self._socket:
            content = message.json()
            if "id" in content:
                if (future := self._waiting.get(content["id"])) and not future.done():
                    future.set_result(content)
                continue
            method, given = content["method"], content["params"]
            if method == "Page.loadEventFired":
                self._loaded.set()
            elif method == "Network.requestWillBeSent":
                self.requests.append(given["request"]["url"])
            elif method == "Runtime.exceptionThrown":
                self.complaints.append(str(given["exceptionDetails"]))
            elif method == "Log.entryAdded" and given["entry"]["level"] == "error":
                self.complaints.append(given["entry"]["text"])
