"""A page in headless Chromium, through its debugging protocol: at any width, with what the browser complains of."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import websocket


class Page:
    """An open page.

    Attributes:
        complaints: What the console and the network said against it, and scripts that failed.
    """

    def __init__(self, connection: websocket.WebSocket) -> None:
        self._connection, self._numbers = connection, itertools.count(1)
        self.complaints: list[str] = []

    def do(self, method: str, **parameters: Any) -> Any:
        """Send a command; return its result. What the browser says meanwhile is taken down."""
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            said = json.loads(self._connection.recv())
            if said.get("id") == number:
                assert "error" not in said, said
                return said["result"]
            self._listen(said)

    def _listen(self, said: dict[str, Any]) -> None:
        what = said["params"]
        if said["method"] == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{what['entry']['text']} {what['entry'].get('url', '')}")
        elif said["method"] == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning"):
            self.complaints.append(" ".join(str(argument.get("value")) for argument in what["args"]))
        elif said["method"] == "Runtime.exceptionThrown":
            self.complaints.append(str(what["exceptionDetails"]))

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        result = self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, url: str, width: int, height: int = 844) -> None:
        """Go to a page and wait until all of it is there.

        Args:
            url: Its address.
            width: Of the window, CSS pixels; the page is shown as on a phone of that width.
            height: Of the window, CSS pixels.
        """
        mobile = width < 600
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.do("Page.navigate", url=url)
        for _ in range(600):
            if self.evaluate("document.readyState == 'complete' && location.href != 'about:blank'"):
                return
            time.sleep(0.1)
        raise AssertionError(f"{url} did not load in a minute")

    def screenshot(self, file: Path) -> None:
        """Save all of the page as PNG."""
        data = self.do("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """Start Chromium, or skip the test where there is none, and yield its page.

    Args:
        folder: For its profile.
    """
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no chromium on PATH (apt-get install chromium)")
    # No name is resolved: a page has to do without a network, and at once. A server of the test's own is at 127.0.0.1.
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    options += ["--remote-debugging-port=0", "--remote-allow-origins=*"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    options += [f"--user-data-dir={folder / 'profile'}"]
    with subprocess.Popen([program, *options, "about:blank"], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            address = next(line.split()[-1] for line in process.stderr if "DevTools listening on" in line)
            with closing(websocket.create_connection(address, timeout=60)) as connection:
                connection.send(json.dumps({"id": 0, "method": "Target.getTargets"}))
                targets = json.loads(connection.recv())["result"]["targetInfos"]
            target = next(target["targetId"] for target in targets if target["type"] == "page")
            host = address.split("/devtools/")[0]
            with closing(websocket.create_connection(f"{host}/devtools/page/{target}", timeout=60)) as connection:
                page = Page(connection)
                for domain in ("Page", "Runtime", "Log"):
                    page.do(f"{domain}.enable")
                yield page
        finally:
            process.kill()
