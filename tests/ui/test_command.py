"""`pixtune ui` before it serves: folders and a port that it cannot use, a token, and what it prints."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pixtune.cli import app
from pixtune.errors import ConfigError, PixtuneError, WriteError
from pixtune.ui.command import TOKEN_VARIABLE, check_folders, check_port


def test_folders_that_cannot_be_opened_are_named_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    check_folders([tmp_path])
    with pytest.raises(ConfigError) as caught:
        check_folders([tmp_path, tmp_path / "file", tmp_path / "none"])
    assert caught.value.faults == [
        f"{tmp_path}/file: it is a file, not a folder",
        f"{tmp_path}/none: there is no such folder; make it first",
    ]
    (tmp_path / "further").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    check_folders([tmp_path / "further", tmp_path])
    with pytest.raises(WriteError, match="cannot be written to"):
        check_folders([tmp_path, tmp_path / "further"])


def test_a_port_or_address_that_cannot_be_had_is_refused_with_another() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PixtuneError, match=f"port {port} .*Is another one running.*--port {port + 1}$"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)
    with pytest.raises(PixtuneError, match=r"192\.0\.2\.1, port 65535 .*--port 7860$"):  # kept for documents: nobody's
        check_port("192.0.2.1", 65535)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is served, instead of serving it, and pages that a browser would open."""
    pytest.importorskip("starlette", reason="the page's packages are not installed: pip install 'pixtune[ui]'")
    found: list[Any] = []

    def serve(folders: Any, address: Any, access: Any, ready: Any) -> None:
        found.append((folders, address, access))
        ready()

    monkeypatch.setattr("pixtune.ui.server.serve", serve)
    monkeypatch.setattr("pixtune.ui.command.check_port", lambda host, port: None)
    monkeypatch.setattr("webbrowser.open", found.append)
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    return found


@pytest.mark.parametrize(
    ("words", "own", "has_token"),
    [((), None, False), (("--token",), None, True), ((), "mine", True), (("--host", "0.0.0.0"), None, True)],
)
def test_only_this_machine_gets_in_without_a_token(
    words: tuple[str, ...], own: str | None, has_token: bool, served: list[Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if own:
        monkeypatch.setenv(TOKEN_VARIABLE, own)
    more = ("--allow-host", "Box.Example", "--root", tmp_path, "--port", 8001)
    outcome = CliRunner().invoke(app, ["ui", str(tmp_path), *map(str, (*words, *more))], catch_exceptions=False)
    (folders, address, access), opened = served
    assert outcome.exit_code == 0 and folders == [tmp_path, tmp_path] and address.port == 8001
    assert access.names == {"box.example"} and (access.token is not None) == has_token
    assert own in (None, access.token)
    assert opened in outcome.stdout and (f"?token={access.token}" in opened) == has_token
    assert ("open to the network" in outcome.stdout) == ("0.0.0.0" in words)


def test_no_browser_is_opened_where_none_is_wanted(served: list[Any], tmp_path: Path) -> None:
    CliRunner().invoke(app, ["ui", str(tmp_path), "--no-browser"], catch_exceptions=False)
    assert len(served) == 1


def test_a_package_that_the_page_lacks_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("starlette", "uvicorn")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("pixtune.ui.security", "pixtune.ui.server"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "starlette", None)
    with pytest.raises(PixtuneError, match=r"needs the package starlette.*pip install 'pixtune\[ui\]'"):
        CliRunner().invoke(app, ["ui", str(tmp_path)], catch_exceptions=False)
