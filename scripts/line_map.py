"""A pytest plugin that writes down, by coverage.py, which test executes which line: `pytest -p scripts.line_map`.

Several processes may share the tests (`-n auto --dist loadfile`). What a test's own code executes counts as the test's,
in processes that it starts too; what a fixture of a wider scope executes counts for every test that uses the fixture.
`mutants.py` asks the map which tests can notice a mutation.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Generator
from functools import partial
from multiprocessing import util
from pathlib import Path
from typing import Any

import coverage
import pytest

FOLDER = "PIXTUNE_LINE_MAP"
"""The environment variable that names the folder which the map is written to."""
CONTEXT = "PIXTUNE_TEST"
"""The environment variable by which processes that a test starts know whose lines they execute."""
SETTINGS = "PIXTUNE_LINE_MAP_SETTINGS"
ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "pixtune"


def start(context: str) -> coverage.Coverage:
    """Starts to count this process's lines for `context`, in a file of its own, and ends a count that was inherited."""
    if (inherited := coverage.Coverage.current()) is not None:
        inherited._auto_save = False
        inherited.stop()
    cov = coverage.Coverage(config_file=os.environ[SETTINGS], data_suffix=True, context=context or None)
    cov.start()
    return cov


def in_forked_process(context: str, before: Callable[[], None] | None) -> None:
    """What a process forked for a test does first: counts for that test, and saves before it ends."""
    cov = start(context)
    util.Finalize(None, partial(_save, cov), exitpriority=100)
    if before is not None:
        before()


def _save(cov: coverage.Coverage) -> None:
    cov.stop()
    cov.save()


def shared_fixtures(item: pytest.Item) -> list[str]:
    """Returns the contexts of the test's fixtures that are set up for more than one test."""
    information = getattr(item, "_fixtureinfo", None)
    definitions = information.name2fixturedefs.values() if information else ()
    return sorted({_label(d) for several in definitions for d in several if d.scope != "function"})


def _label(definition: Any) -> str:
    return f"fixture {definition.baseid}::{definition.argname}"


class LineMap:
    """The plugin: a context for each test and for each fixture of a wider scope."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tests: dict[str, dict[str, object]] = {}
        self.coverage = start("")
        self.current = ""

    def switch(self, context: str) -> str:
        previous, self.current = self.current, context
        self.coverage.switch_context(context)
        os.environ[CONTEXT] = context
        return previous

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self) -> None:
        """Processes that tests fork count for the test that started them."""
        from tests import processes

        plain = processes.start

        def start(words: Any, env: Any, before: Any = None) -> Any:
            env = {**env, SETTINGS: os.environ[SETTINGS]}
            return plain(
                words, env, partial(in_forked_process, self.current, before) if processes.can_fork() else before
            )

        processes.start = start

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.switch(item.nodeid)
        began = time.monotonic()
        result = yield
        self.tests.setdefault(item.nodeid, {})["seconds"] = round(time.monotonic() - began, 3)
        self.tests[item.nodeid]["fixtures"] = shared_fixtures(item)
        self.switch("")
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, Any, Any]:
        if fixturedef.scope == "function":
            return (yield)
        previous = self.switch(_label(fixturedef))
        try:
            return (yield)
        finally:
            self.switch(previous)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        known = self.tests.setdefault(report.nodeid, {})
        known["outcome"] = report.outcome if report.outcome != "passed" else known.get("outcome", "passed")

    def pytest_sessionfinish(self) -> None:
        _save(self.coverage)
        (self.folder / f"tests-{os.getpid()}.json").write_text(json.dumps(self.tests))


def prepare(folder: Path) -> None:
    """Makes the map's folder, keeps the mapped source in it, and tells processes to come what they write to it."""
    settings = folder / "settings.ini"
    folder.mkdir(parents=True, exist_ok=True)
    settings.write_text(
        f"[run]\nsource = {SOURCE}\ndata_file = {folder / 'lines'}\nparallel = true\n"
        f"context = ${{{CONTEXT}-}}\ndisable_warnings = no-data-collected, module-not-imported, already-imported\n"
    )
    os.environ |= {SETTINGS: str(settings), "COVERAGE_PROCESS_START": str(settings), CONTEXT: ""}
    shutil.copytree(SOURCE, folder / "source", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


def pytest_configure(config: pytest.Config) -> None:
    """Registers the plugin where a folder for the map is named, in each process that runs tests."""
    if FOLDER not in os.environ:
        return
    folder = Path(os.environ[FOLDER])
    told_by_another = hasattr(config, "workerinput")
    if not told_by_another:
        prepare(folder)
    if told_by_another or config.getoption("dist", "no") == "no":
        config.pluginmanager.register(LineMap(folder))
