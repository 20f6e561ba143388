"""Writes down what a process exchanges with others: see `pixtune_together(..., before=write_exchanges_down)`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from torch import Tensor, distributed

VARIABLE = "EXCHANGES_OF_A_TEST"
"""Environment variable of the folder that gets a file for each process."""
KINDS = ("all_reduce", "all_gather_into_tensor")
"""Calls of torch whose first argument is as large as what is exchanged."""


def write_exchanges_down() -> None:
    """Has each exchange of this process add a line with its kind and its bytes to a file."""
    path = Path(os.environ[VARIABLE]) / os.environ["RANK"]

    def writing(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def write(*args: Any, **kwargs: Any) -> Any:
            tensor = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
            with path.open("a") as file:
                file.write(json.dumps([name, tensor.nbytes]) + "\n")
            return call(*args, **kwargs)

        return write

    for name in KINDS:
        setattr(distributed, name, writing(name, getattr(distributed, name)))


def read_exchanges(folder: Path, rank: int) -> list[tuple[str, int]]:
    """What a process has exchanged, in its order."""
    path = folder / str(rank)
    lines = path.read_text().splitlines() if path.exists() else []
    return [(kind, num_bytes) for kind, num_bytes in map(json.loads, lines)]
