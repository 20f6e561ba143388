"""Requests to a run from outside: files in its output folder, which it looks for after steps.

A file reaches a run on another machine or in a container, which no signal does, and any program or page can write it.
The run looks as often as it logs losses (`logging_steps`), and none of these changes a bit of what it trains.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Literal, get_args

from pixtune.errors import WriteError

log = logging.getLogger(__name__)

Request = Literal["sample_now", "save_now", "stop_now", "pause"]
"""Names of the files. Each is gone once it is answered, but `pause`: the run goes on when somebody deletes it."""
REQUESTS: tuple[Request, ...] = get_args(Request)


def ask(output_dir: Path, request: Request) -> None:
    """Leaves a request.

    Raises:
        WriteError: it could not be written.
    """
    try:
        (output_dir / request).touch()
    except OSError as error:
        raise WriteError(f"{output_dir / request} could not be written ({error.strerror or error})") from error


def is_asked(output_dir: Path, request: Request) -> bool:
    """Returns whether somebody has asked for it, and has had no answer so far."""
    return os.path.lexists(output_dir / request)


def withdraw(output_dir: Path, request: Request) -> None:
    """Takes a request back, or marks it as answered.

    Raises:
        OSError: the file cannot be deleted.
    """
    (output_dir / request).unlink(missing_ok=True)


def forget_requests(output_dir: Path) -> None:
    """Deletes what a session was asked for and will not answer any more. Samples are drawn whoever asked for them."""
    for request in REQUESTS:
        if request != "sample_now" and is_asked(output_dir, request):
            try:
                withdraw(output_dir, request)
            except OSError as error:
                log.warning("%s asks a run that has ended, and cannot be deleted (%s)", output_dir / request, error)
