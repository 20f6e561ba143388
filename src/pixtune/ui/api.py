"""Describes the routes for programs, as OpenAPI 3.1 has them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse

from pixtune.ui.answers import Handler

ABOUT = (
    "Every page answers JSON where `Accept: application/json` is sent without text/html. Requests that change "
    "something are forms, or JSON objects of texts. A place is the name of a chosen folder and a path below it, as "
    "here/configs/cat.yaml or here/runs/cat. With a token: `Authorization: Bearer TOKEN`. Errors are "
    '{"error": ..., "faults": [...]}.'
)


def openapi(routes: Sequence[tuple[str, str, Handler]]) -> JSONResponse:
    """Describes routes by the docstrings of their handlers."""
    paths: dict[str, dict[str, Any]] = {}
    for method, path, handler in routes:
        sentences = inspect.cleandoc(handler.__doc__ or "")
        operation: dict[str, Any] = {
            "summary": sentences.split("\n")[0],
            "description": sentences,
            "responses": {"200": {"description": "as the summary says"}, "default": {"description": "an error"}},
        }
        if "{place:path}" in path:
            operation["parameters"] = [{"name": "place", "in": "path", "required": True, "schema": {"type": "string"}}]
        if method == "POST":
            schema = {"type": "object", "additionalProperties": {"type": "string"}}
            kinds = ("application/json", "application/x-www-form-urlencoded")
            operation["requestBody"] = {"content": {kind: {"schema": schema} for kind in kinds}}
        paths.setdefault(path.replace("{place:path}", "{place}"), {})[method.lower()] = operation
    return JSONResponse(
        {"openapi": "3.1.0", "info": {"title": "pixtune ui", "version": "1", "description": ABOUT}, "paths": paths}
    )
