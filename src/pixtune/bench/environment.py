"""The environment that a benchmark's figures belong to: machine, versions, commit, date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pixtune.hardware.facts import package_versions

NO_COMMIT = "unknown (not in a git checkout)"


def describe() -> dict[str, Any]:
    """Returns the JSON values that stand in every result."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": {"gpu": gpu, "cpu": platform.machine(), "cores": os.cpu_count()},
        "versions": package_versions(),
        "commit": read_commit(Path(__file__)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def read_commit(source: Path) -> str:
    """Returns the commit that a source file belongs to, with "-dirty" where the checkout has changes.

    An installed package may lie in a repository of the user's own, whose commit says nothing about it: there the file
    is not tracked.
    """
    if _git(source, "ls-files", "--error-unmatch", source.name) is None:
        return NO_COMMIT
    return _git(source, "describe", "--always", "--dirty") or NO_COMMIT


def _git(source: Path, *words: str) -> str | None:
    """Runs git in a file's folder and returns its output; None where it fails or is not installed."""
    try:
        run = subprocess.run(["git", *words], cwd=source.parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None
