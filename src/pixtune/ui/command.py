"""`pixtune ui`: serves the page, and opens it in a browser."""

from __future__ import annotations

import os
import socket
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from pixtune.errors import ConfigError, PixtuneError, WriteError

INSTALL = "pip install 'pixtune[ui]'"
TOKEN_VARIABLE = "PIXTUNE_UI_TOKEN"


def ui(
    home: Annotated[
        Path, typer.Argument(help="Folder for configs, data sets and runs; the page opens what lies in it.")
    ] = Path("."),
    root: Annotated[
        list[Path] | None, typer.Option(help="Further folder that the page may open; may be given several times.")
    ] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 opens the page to the network, with a token.")
    ] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Further host name under which browsers reach it.")
    ] = None,
    token: Annotated[
        bool,
        typer.Option(
            "--token",
            help="Ask for a token on this machine, too, where others have accounts. The variable "
            f"{TOKEN_VARIABLE} holds one of your own.",
        ),
    ] = False,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Open the page in a browser: pictures, plan, runs, results.

    Runs that it starts go on when it ends. For example:

    \b
    pixtune ui
    pixtune ui ~/training --root /data/pictures
    """
    try:
        from pixtune.ui.security import Access
        from pixtune.ui.server import Address, new_token, serve
    except ModuleNotFoundError as error:
        raise PixtuneError(f"the page needs the package {error.name}, which is not installed: {INSTALL}") from error
    folders = [home, *(root or ())]
    check_folders(folders)
    address = Address(host, port)
    secret = os.environ.get(TOKEN_VARIABLE) or (new_token() if token or not address.is_local else None)
    check_port(address.host, address.port)

    def ready() -> None:
        typer.echo(f"The page is at {address.url(secret)}\nCtrl-C ends it; runs that were started go on.")
        if not address.is_local:
            typer.echo("It is open to the network: whoever has the token above may start runs and read these folders.")
        if browser:
            webbrowser.open(address.url(secret))

    serve(folders, address, Access(secret, frozenset(name.lower() for name in allow_host or ())), ready)


def check_folders(folders: list[Path]) -> None:
    """Checks that the chosen folders are there.

    Raises:
        ConfigError: some are not; lists them.
    """
    missing = [
        f"{folder}: {'it is a file, not a folder' if folder.exists() else 'there is no such folder; make it first'}"
        for folder in folders
        if not folder.is_dir()
    ]
    if missing:
        raise ConfigError("the page cannot open these folders", missing)
    if not os.access(folders[0], os.W_OK):
        raise WriteError(f"{folders[0]} cannot be written to, and configs and runs of the page go there: name another.")


def check_port(host: str, port: int) -> None:
    """Checks that the page can listen at an address.

    Raises:
        PixtuneError: it cannot; says why.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise PixtuneError(
            f"the page cannot listen at {host}, port {port} ({error.strerror or error}). Is another one running? "
            f"Choose another port: pixtune ui --port {port + 1 if port < 65535 else 7860}"
        ) from error
