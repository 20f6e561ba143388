"""Puts the page together: its routes, what stands before them, and how it is served."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from pixtune.errors import PixtuneError
from pixtune.queue.store import usual_folder
from pixtune.storage.files import user_cache_folder
from pixtune.ui import checks, describe, home, masks, pictures, plan_page, queue_page, results, run_page, uploads
from pixtune.ui.answers import HERE, answer, read_form, show_error
from pixtune.ui.api import openapi
from pixtune.ui.jobs import Jobs
from pixtune.ui.roots import Roots
from pixtune.ui.security import Access, Guard, with_cookie
from pixtune.ui.thumbnails import Thumbnails
from pixtune.ui.workplace import Workplace

REAP_SECONDS = 5.0
PLACE = "{place:path}"

ROUTES = (
    ("GET", "/", home.show),
    ("POST", "/new", home.create),
    ("GET", f"/folders/{PLACE}", home.folders),
    ("GET", f"/pictures/{PLACE}", pictures.show),
    ("GET", f"/thumb/{PLACE}", pictures.thumb),
    ("POST", f"/caption/{PLACE}", pictures.save_caption),
    ("POST", f"/replace/{PLACE}", pictures.replace_all),
    ("POST", f"/undo/{PLACE}", pictures.undo),
    ("PUT", f"/upload/{PLACE}", uploads.receive),
    ("GET", f"/mask/{PLACE}", masks.show_mask),
    ("PUT", f"/mask/{PLACE}", masks.save_mask),
    ("POST", f"/swap/{PLACE}", masks.swap),
    ("GET", f"/check/{PLACE}", checks.show),
    ("POST", f"/check/{PLACE}", checks.start),
    ("GET", f"/describe/{PLACE}", describe.show),
    ("POST", f"/describe/{PLACE}", describe.start),
    ("GET", f"/plan/{PLACE}", plan_page.show),
    ("POST", f"/plan/{PLACE}", plan_page.change),
    ("GET", f"/yaml/{PLACE}", plan_page.yaml_file),
    ("POST", f"/start/{PLACE}", run_page.start),
    ("GET", f"/run/{PLACE}", run_page.show),
    ("POST", f"/ask/{PLACE}", run_page.ask_run),
    ("GET", f"/events/{PLACE}", run_page.events),
    ("GET", f"/figures/{PLACE}", run_page.figures),
    ("GET", f"/samples/{PLACE}", run_page.samples),
    ("GET", f"/console/{PLACE}", run_page.console),
    ("GET", f"/result/{PLACE}", results.show),
    ("GET", f"/download/{PLACE}", results.download),
    ("GET", f"/card/{PLACE}", results.card),
    ("GET", "/compare", results.compare),
    ("GET", "/queue", queue_page.show),
    ("POST", "/queue", queue_page.change),
)
"""Method, path and handler; `place` is the place of a config or folder, as `roots.Roots` has it."""


@dataclass(frozen=True)
class Address:
    """Address at which the page is served."""

    host: str = "127.0.0.1"
    port: int = 7860

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host in ("127.0.0.1", "localhost", "::1")

    def url(self, token: str | None) -> str:
        """Returns what a person opens."""
        name = self.host if self.is_local else socket.gethostname()
        shown = f"[{name}]" if ":" in name else name
        return f"http://{shown}:{self.port}/" + (f"?token={token}" if token else "")


def build_app(folders: Sequence[Path], access: Access, thumbnails: Path | None = None) -> Starlette:
    """Builds the application.

    Args:
        folders: the folders that may be opened; configs, data sets and runs of the page go to the first. The process
            must run in it, since relative paths of configs mean it.
        thumbnails: folder for small pictures; None: the user's cache.
    """
    roots = Roots(folders)
    kept = thumbnails or (user_cache_folder() or roots.home / ".pixtune-ui") / "thumbnails"
    work = Workplace(roots, Jobs(roots.home), Thumbnails(kept))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(reap(work)), asyncio.create_task(queue_page.serve_queue(work, usual_folder()))]
        yield
        for task in tasks:
            task.cancel()
        await work.thumbnails.end()

    async def log_in(request: Request) -> Response:
        """The form for the token of a server that is open to a network."""
        if request.method == "GET":
            return answer(request, "login.html", {"wrong": False})
        form = await read_form(request)
        if access.matches(form.get("token", "").strip()):
            return with_cookie(RedirectResponse("/", 303), access)
        return answer(request, "login.html", {"wrong": True}, 401)

    async def describe_api(request: Request) -> Response:
        """This description, as OpenAPI has it."""
        return openapi(ROUTES)

    app = Starlette(
        routes=[
            *(Route(path, handler, methods=[method]) for method, path, handler in ROUTES),
            Route("/login", log_in, methods=["GET", "POST"]),
            Route("/openapi.json", describe_api),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ],
        middleware=[Middleware(Guard, access=access)],
        exception_handlers={PixtuneError: show_error},
        lifespan=lifespan,
    )
    app.state.workplace = work
    return app


async def reap(work: Workplace) -> None:
    """Takes note of ended processes now and then."""
    while True:
        await asyncio.sleep(REAP_SECONDS)
        work.jobs.reap()


def serve(folders: Sequence[Path], address: Address, access: Access, ready: Callable[[], None]) -> None:
    """Serves the page until it is interrupted. Runs that were started go on.

    Args:
        ready: called once the page can be opened.
    """
    os.chdir(folders[0])
    app = build_app(folders, access)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for watch in app.state.workplace.watches.values():
                await watch.close()  # else their streams keep the server waiting
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, host=address.host, port=address.port, log_level="warning", timeout_graceful_shutdown=2, ws="none",
        server_header=False, timeout_keep_alive=15, h11_max_incomplete_event_size=64 << 10,
    )  # fmt: skip
    Server(config).run()


def new_token() -> str:
    """Draws a token that cannot be guessed."""
    return secrets.token_urlsafe(24)
