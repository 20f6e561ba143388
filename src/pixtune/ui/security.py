"""Stands before all routes: who may ask (Host, Origin, token), and what a browser may do with an answer.

A page of any web site can send requests to a server on this machine. Its Host header gives it away where it reached us
by a name of its own (DNS rebinding), its Origin or Sec-Fetch-Site header where it asks across sites.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""Content security policy: nothing foreign is loaded, and no script or style counts but ours."""
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
LOCAL_NAMES = {"localhost", "localhost.localdomain"}
COOKIE = "pixtune_token"
OPEN_PATHS = ("/static/", "/login")
"""Beginnings of paths that are answered without a token: they show nothing of the user's."""


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    token: str | None = None
    """Secret that every request must carry, as a cookie or bearer token; None: none is needed."""
    names: frozenset[str] = frozenset()
    """Further host names by which the server may be reached, in lower case."""

    def knows_host(self, host: str) -> bool:
        """Returns whether a Host header can be that of this server: an IP address, which no name server can turn to
        another machine, or a name of this machine."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
            urlsplit(f"//{host}").port  # noqa: B018  (raises where it is no number)
        except ValueError:
            return False
        if not name or any(letter in host for letter in "/?#@\\ "):
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name in LOCAL_NAMES or name in self.names or name == socket.gethostname().lower()
        return True

    def has_token(self, headers: Headers) -> bool:
        """Returns whether a request carries the token, if one is needed."""
        if self.token is None:
            return True
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.matches(bearer.strip()):
            return True
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return False
        return COOKIE in cookies and self.matches(cookies[COOKIE].value)

    def matches(self, given: str) -> bool:
        """Compares a token in a time that does not depend on where they differ."""
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())


def is_foreign(method: str, headers: Mapping[str, str]) -> bool:
    """Returns whether a request was made by a page of another site.

    A link that leads here may be followed; all else across sites is refused, reading pictures included. Programs send
    neither header.
    """
    site = headers.get("sec-fetch-site")
    if method in SAFE_METHODS:
        return site in ("cross-site", "same-site") and headers.get("sec-fetch-mode") != "navigate"
    origin = headers.get("origin")
    if origin is not None:
        try:
            return urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
        except ValueError:
            return True
    return site not in (None, "same-origin", "none")


class Guard:
    """Middleware that refuses requests by `Access`, and puts `HEADERS` on every answer."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
            await send(message)

        refusal = self.refusal(scope)
        await (refusal or self.app)(scope, receive, send_guarded)

    def refusal(self, scope: Scope) -> Response | None:
        """Returns the answer to a request that goes no further; None where it may."""
        headers, path = Headers(scope=scope), scope["path"]
        if len(headers.getlist("host")) != 1 or not self.access.knows_host(headers.get("host", "")):
            return plain(
                421,
                "This address is not known as one of this server. If it is right, start the server with "
                "--allow-host NAME.",
            )
        if is_foreign(scope["method"], headers):
            return plain(403, "This request comes from a page of another site, and is refused.")
        query = parse_qs(scope["query_string"].decode("latin-1"))
        if scope["method"] == "GET" and "token" in query and self.access.token is not None:
            if not self.access.matches(query["token"][0]):
                return plain(401, "This token is not that of the running server. It prints its address when it starts.")
            left = urlencode([(k, v) for k, v in parse_qsl(scope["query_string"].decode("latin-1")) if k != "token"])
            return with_cookie(RedirectResponse(local_path(path) + (f"?{left}" if left else ""), 303), self.access)
        if path.startswith(OPEN_PATHS) or self.access.has_token(headers):
            return None
        if "text/html" in headers.get("accept", "") and scope["method"] == "GET":
            return RedirectResponse("/login", 303)
        return JSONResponse({"error": "a token is needed: Authorization: Bearer TOKEN"}, 401)


def local_path(path: str) -> str:
    """Returns a path as a target of a redirect that cannot lead to another server."""
    return "/" + path.lstrip("/\\")


def with_cookie(response: Response, access: Access) -> Response:
    """Lets a browser carry the token from here on; scripts cannot read it, and other sites cannot send it."""
    response.set_cookie(COOKIE, access.token or "", max_age=30 * 86400, httponly=True, samesite="strict")
    return response


def plain(status: int, sentence: str) -> HTMLResponse:
    """Returns a sentence as an answer; it must hold nothing of the request."""
    page = f'<!doctype html><html lang="en"><title>pixtune</title><p>{sentence}</p></html>'
    return HTMLResponse(page, status)
