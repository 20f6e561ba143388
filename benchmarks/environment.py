"""What a benchmark's figures belong to: machine, versions, commit, date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pixtune.hardware.facts import package_versions


def describe() -> dict[str, Any]:
    """JSON values that stand in every result."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "machine": {"gpu": gpu, "cpu": platform.machine(), "cores": os.cpu_count()},
        "versions": package_versions(),
        "commit": git.stdout.strip() or "unknown (no git here)",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
