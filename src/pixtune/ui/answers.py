"""Answers of all routes: a page for people, the same values as JSON for programs; and what is read of a request."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from pixtune.errors import FaultsError, PixtuneError
from pixtune.ui.roots import OutsideError

MOST_FORM_BYTES = 4 << 20
"""Size of a form's fields: a config has at most a MiB, a caption as well."""
HERE = Path(__file__).parent

PAGES = Environment(
    loader=FileSystemLoader(HERE / "templates"), autoescape=select_autoescape(default=True), undefined=StrictUndefined,
    trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip


def as_url(place: str) -> str:
    """Quotes a place for a URL's path."""
    return quote(place, safe="/")


def with_code(text: str) -> Markup:
    """Escapes a text, and sets what stands between backticks as code."""
    parts = str(escape(text)).split("`")
    return Markup("".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts)))


PAGES.filters["url"] = as_url
PAGES.filters["with_code"] = with_code
PAGES.filters["tojson_plain"] = lambda value: json.dumps(plain_values(value))


class BadRequestError(PixtuneError):
    """A request that lacks something or holds what cannot be."""


class ConflictError(PixtuneError):
    """Something has changed since it was shown, so that a request is not what its sender means any more."""


def wants_json(request: Request) -> bool:
    """Returns whether a program asks: it accepts JSON and no page."""
    accept = request.headers.get("accept", "")
    return "application/json" in accept and "text/html" not in accept


def answer(request: Request, template: str, view: Mapping[str, Any], status: int = 200) -> Response:
    """Renders a view as a page, or gives its values as JSON."""
    if wants_json(request):
        return JSONResponse(plain_values(view), status, headers={"vary": "Accept"})
    page = PAGES.get_template(template).render({"request_path": request.url.path, **view})
    return HTMLResponse(page.encode("utf-8", errors="replace"), status, headers={"vary": "Accept"})


def done(request: Request, url: str, view: Mapping[str, Any]) -> Response:
    """Answers a request that has changed something: programs get values, people the page at `url`."""
    if wants_json(request):
        return JSONResponse(plain_values(view))
    if request.headers.get("hx-request"):
        return Response(status_code=204, headers={"hx-redirect": url})
    return RedirectResponse(url, 303)


def plain_values(value: Any) -> Any:
    """Returns a value with nothing in it but what JSON has; numbers that are none become null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain_values(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain_values(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_values(each) for each in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def status_of(error: PixtuneError) -> int:
    """Returns the HTTP status of an error."""
    if isinstance(error, OutsideError):
        return 404
    return 409 if isinstance(error, ConflictError) else 400


async def show_error(request: Request, error: Exception) -> Response:
    """Shows an error that a user can act on, with its remedy."""
    assert isinstance(error, PixtuneError)
    what, faults = (error.headline, error.faults) if isinstance(error, FaultsError) else (str(error), [])
    if wants_json(request) or request.headers.get("x-pixtune") == "fetch":
        return JSONResponse({"error": what, "faults": faults}, status_of(error))
    template = "error_part.html" if request.headers.get("hx-request") else "error.html"
    return answer(request, template, {"what": what, "faults": faults}, status_of(error))


async def read_body(request: Request, most_bytes: int) -> bytes:
    """Reads a request's body.

    Raises:
        BadRequestError: it is larger than `most_bytes`, or breaks off.
    """
    data = bytearray()
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > most_bytes:
                raise BadRequestError(f"the request has more than {most_bytes:,} bytes, the most that is read")
    except ClientDisconnect as error:
        raise BadRequestError("the request broke off") from error
    return bytes(data)


async def read_form(request: Request) -> dict[str, str]:
    """Reads the fields of a form, or of a JSON object of texts; of equal names the last one counts.

    Raises:
        BadRequestError: it is neither, or too large.
    """
    data = await read_body(request, MOST_FORM_BYTES)
    try:
        if request.headers.get("content-type", "").partition(";")[0].strip() == "application/json":
            values = json.loads(data or b"{}")
            if not isinstance(values, dict) or not all(isinstance(each, str) for each in values.values()):
                raise BadRequestError("the request must be a JSON object whose values are texts")
            return values
        pairs = parse_qsl(data.decode("utf-8"), keep_blank_values=True, max_num_fields=2000, errors="strict")
    except (ValueError, RecursionError) as error:
        raise BadRequestError("the request's fields cannot be read: they must be a form, or JSON in UTF-8") from error
    return dict(pairs)


def field(form: Mapping[str, str], name: str) -> str:
    """Returns a field that must be there.

    Raises:
        BadRequestError: it is not.
    """
    if name not in form:
        raise BadRequestError(f"the field {name!r} is missing")
    return form[name]


Handler = Callable[[Request], Awaitable[Response]]
