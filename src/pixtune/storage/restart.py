"""Lets a run that torchrun has started anew go on from what it has saved, whatever its config says.

`torchrun --max-restarts N` starts all processes again when one has failed, by the same command. A new start would be
refused then, since the folder holds a run; a named checkpoint would set the run back to where it began. So checkpoints
record the launch that wrote them, and what this launch has saved goes first. Without any, the config decides as at the
first start, so that a restart does nothing that the first start refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from pixtune.storage.checkpoint import read_folder
from pixtune.storage.checkpoint_state import read_state
from pixtune.storage.files import text_digest
from pixtune.storage.output_lock import start_of

UNNAMED = "none"
"""The name of a launch by torchrun that was given none."""


def launch_of(environ: Mapping[str, str]) -> str | None:
    """Returns a digest that stays the same in all restarts of one launch; None where nothing restarts this process."""
    name = environ.get("TORCHELASTIC_RUN_ID")
    if name is None or _number(environ, "TORCHELASTIC_MAX_RESTARTS") == 0:
        return None
    if name == UNNAMED:  # many launches are called so; this one's launcher lives on through its restarts
        name = f"{UNNAMED} {os.getppid()} {start_of(os.getppid())}"
    return text_digest(name)[:16]


def resume_after_restart(
    output_dir: Path, resume_from: str | None, environ: Mapping[str, str], show: Callable[[str], None]
) -> str | None:
    """Returns what counts as the config's `resume_from_checkpoint`: "latest" where this launch has saved a step.

    Args:
        show: receives a sentence where that is another value.
    """
    restarts, launch = _number(environ, "TORCHELASTIC_RESTART_COUNT"), launch_of(environ)
    if restarts == 0 or launch is None or resume_from == "latest":
        return resume_from
    if not any(
        read_state(each.path)["record"].get("launch") == launch for each in read_folder(output_dir).order.course
    ):
        return resume_from
    of_all = environ["TORCHELASTIC_MAX_RESTARTS"]
    show(f"restart {restarts} of {of_all} by the launcher: going on from what this run has saved in {output_dir}")
    return "latest"


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "0")
    return int(value) if value.isdecimal() else 0
