"""Turns warnings and errors of a command into lines for people and an exit code for programs, without a traceback."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable

import typer
from rich.console import Console

from pixtune.console import make_printing_safe
from pixtune.errors import PixtuneError
from pixtune.inputs.printing import lines
from pixtune.launch.stop import STOPPED


def exit_on_user_errors(run: Callable[[], object]) -> None:
    """Runs something; warnings are printed as lines and errors of users, disks and connections as one block."""
    make_printing_safe()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if take_debug(sys.argv):
        logging.getLogger("pixtune").setLevel(logging.DEBUG)
    for handler in logging.getLogger().handlers:
        handler.addFilter(make_fit)
    # On import it tells every user without a GPU to install a package that is of no use to training.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        run()
    except (PixtuneError, OSError) as error:
        logging.getLogger(__name__).debug("where it happened", exc_info=True)
        Console(stderr=True, soft_wrap=True).print("[bold red]error:[/] ", end="")
        print(error if isinstance(error, PixtuneError) else system_trouble(error), file=sys.stderr)
        raise SystemExit(1) from error
    except SystemExit as end:
        if isinstance(end.__context__, typer.Abort):  # Ctrl-C, which is the same everywhere
            raise SystemExit(STOPPED) from None
        raise
    finally:
        gc.freeze()  # else Python looks through a million objects of the libraries before it ends, for some seconds


def take_debug(words: list[str]) -> bool:
    """Takes `--debug` out of a command's words, wherever it stands before a `--`; returns whether it was there."""
    options = words[: words.index("--")] if "--" in words else words
    found = "--debug" in options[1:]
    words[:] = [word for word in options if word != "--debug"] + words[len(options) :]
    return found


def system_trouble(error: OSError) -> str:
    """Describes an error of the system that no other place has expected."""
    return (
        f"{' '.join(str(error).split()) or type(error).__name__}. The system reports this, of a disk, a connection or "
        "a permission. Checkpoints that were saved before are kept: mend it, and resume with "
        "resume_from_checkpoint=latest."
    )


def make_fit(record: logging.LogRecord) -> bool:
    """Makes a log record's text fit for a terminal, and lets it pass."""
    record.msg, record.args = lines(record.getMessage()), None
    if record.exc_info and record.exc_info[0]:
        record.exc_text = lines(logging.Formatter().formatException(record.exc_info))
    return True
