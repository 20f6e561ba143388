"""What the processes of a run exchange in each step, as torch's own functions are called."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = {
    "all_reduce": ("all_reduce", 0),
    "all_gather_into_tensor": ("all_gather", 0),
    "all_gather_single": ("all_gather", 0),
    "reduce_scatter_tensor": ("reduce_scatter", 1),
    "reduce_scatter_single": ("reduce_scatter", 1),
}
"""Functions of `torch.distributed` that move tensors, what each does, and which argument is the whole tensor."""


def record(folder: Path) -> None:
    """Has this process write what each step of it exchanges: a list of [kind, bytes, processes] by step."""
    import torch.distributed as dist

    from pixtune import train

    steps: list[list[Any]] = []
    is_counted: list[bool] = []

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        kind, whole = KINDS[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            if steps and not is_counted:  # one of them may call another
                group = kwargs.get("group") or next(
                    (each for each in args if isinstance(each, dist.ProcessGroup)), None
                )
                steps[-1].append([kind, args[whole].nbytes, dist.get_world_size(group)])
            is_counted.append(True)
            try:
                return function(*args, **kwargs)
            finally:
                is_counted.pop()

        return call

    for name in KINDS:
        if hasattr(dist, name):
            setattr(dist, name, recorded(name, getattr(dist, name)))
    take = train.train_step

    def take_and_write(run: Any, micro_batches: Any, step: int) -> Any:
        steps.append([])
        outcome = take(run, micro_batches, step)
        trained = sum(weight.numel() for weight in run.trained.parameters.values())
        (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps({"trained": trained, "steps": steps}))
        return outcome

    vars(train)["train_step"] = take_and_write
