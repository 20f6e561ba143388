"""A real browser at the page of a real server. Debian's Chromium serves, driven by Playwright for Python."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.runs import ROOT, environment

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or ""
AXE = Path(__file__).parent / "vendor" / "axe.min.js"
NO_BROWSER = "no Chromium is installed: apt-get install chromium"


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(home: Path) -> Iterator[str]:
    """Runs `pixtune ui HOME` and gives the page's address. Runs that it starts are left alone at its end."""
    port = free_port()
    words = [sys.executable, "-m", "pixtune.cli", "ui", str(home), "--no-browser", "--port", str(port)]
    own = {"XDG_CACHE_HOME": str(home.parent / "cache"), "PIXTUNE_QUEUE": str(home.parent / "queue")}
    env = environment(**own, PYTHONPATH=os.pathsep.join(sys.path))
    with (home.parent / f"server-{port}.txt").open("wb") as log:
        server = subprocess.Popen(words, cwd=ROOT, env=env, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and server.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        assert server.poll() is None, Path(log.name).read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)
        assert "Traceback" not in Path(log.name).read_text(), Path(log.name).read_text()


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser, of which each context is a user of its own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if not CHROMIUM:
        pytest.skip(NO_BROWSER)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        try:
            yield browser
        finally:
            browser.close()


class Visitor:
    """A page in a browser that remembers script errors and requests to anyone but the server."""

    def __init__(self, browser: Any, base: str, **options: Any) -> None:
        self.page = browser.new_context(base_url=base, viewport={"width": 1440, "height": 900}, **options).new_page()
        self.problems: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(f"script error: {error}"))
        self.page.on("console", self._hear)
        self.page.on("request", lambda request: self._see(request.url, base))
        self.page.set_default_timeout(60_000)

    def _hear(self, message: Any) -> None:
        if message.type == "error":
            self.problems.append(f"console: {message.text}")

    def _see(self, url: str, base: str) -> None:
        if not url.startswith((base, "data:", "blob:")):
            self.problems.append(f"foreign request: {url}")

    def check(self) -> None:
        """Fails where anything was amiss since the last check."""
        problems, self.problems = self.problems, []
        assert not problems, problems

    def check_accessible(self) -> None:
        """Fails where axe-core finds anything serious on the page as it is."""
        before = len(self.problems)
        self.page.evaluate(AXE.read_text())  # by the protocol, which the page's own policy does not bind
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']}).then((found) => found.violations)")
        self.page.wait_for_timeout(50)
        own = [each for each in self.problems[before:] if "inline style" in each]  # axe tries styles of its own
        self.problems = [each for each in self.problems if each not in own]
        serious = [
            (each["id"], each["help"], [node["target"] for node in each["nodes"]][:4])
            for each in found
            if each["impact"] in ("serious", "critical")
        ]
        assert not serious, serious
