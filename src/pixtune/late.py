"""Modules that take seconds to import, imported at their first use.

`pixtune plan` needs sizes and names of a family alone, and is not to wait for torch, which the same file computes with.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class LateModule:
    """A stand-in for the module of a name, which is imported when an attribute of it is read."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)
