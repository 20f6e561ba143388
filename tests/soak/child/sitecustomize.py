"""Lets the disk fail in a process that a launcher starts: Python imports a module of this name first thing."""

import json
import os
from pathlib import Path

from tests.io_faults import FailingDisk

if "SOAK_FAULT" in os.environ:
    _fault = json.loads(os.environ["SOAK_FAULT"])
    FailingDisk(
        **{
            **_fault,
            "folder": Path(_fault["folder"]),
            "journal": Path(f"{_fault['journal']}.{os.environ.get('RANK', 'launcher')}"),
        }
    )()
