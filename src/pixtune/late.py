"""Modules that take seconds to import, imported when something of them is used first.

`pixtune plan` asks a family for sizes and names alone and is not to wait for torch, which the same file computes with.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class LateModule:
    """Stands for a module of that name; its attributes are the module's."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)
