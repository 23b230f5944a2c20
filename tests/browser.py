"""A page in headless Chromium, driven by Debian's chromedriver in the W3C's WebDriver protocol."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
from typing import Any

import httpx

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
ENTER, ESCAPE = "\ue007", "\ue00c"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key under which the protocol names an element


class Browser(contextlib.ExitStack):
    """One page of `width` by `height` pixels at an address."""

    def __init__(self, url: str, width: int, height: int) -> None:
        super().__init__()
        assert CHROMIUM is not None and DRIVER is not None
        process = self.enter_context(subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True))
        self.callback(process.terminate)
        assert process.stdout is not None
        port = next(line.split()[-1].rstrip(".") for line in process.stdout if "started successfully" in line)
        self._http = self.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60))
        options = {"binary": CHROMIUM, "args": ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage"]}
        session = self._post("/session", capabilities={"alwaysMatch": {"goog:chromeOptions": options}})
        self._path = f"/session/{session['sessionId']}"
        self.callback(self._http.delete, self._path)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        self._post(f"{self._path}/url", url=url)

    def _post(self, path: str, **body: Any) -> Any:
        answer = self._http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["value"]

    def devtools(self, command: str, **parameters: Any) -> None:
        self._post(f"{self._path}/goog/cdp/execute", cmd=command, params=parameters)

    def evaluate(self, expression: str) -> Any:
        return self._post(f"{self._path}/execute/sync", script=f"return {expression}", args=[])

    def wait(self, expression: str) -> None:
        """Until an expression is true, for 30 seconds at most."""
        end = time.monotonic() + 30
        while not self.evaluate(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Press these keys where the focus is."""
        element = self._http.get(f"{self._path}/element/active").json()["value"][ELEMENT]
        self._post(f"{self._path}/element/{element}/value", text=text)

    def reload(self) -> None:
        self._post(f"{self._path}/refresh")
