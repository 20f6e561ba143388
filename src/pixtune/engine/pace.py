"""Keeps the host close to the device in work between steps, so that it can be ended within a pass or two."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Pace:
    """A function to be called after each pass: it waits until the device has done the pass before the last.

    Unchecked, a host launches all passes of a sample in a moment, and the device is busy with them for half a minute.

    Args:
        check: called after each pass; may raise to end the work.
    """

    def __init__(self, device: torch.device, check: Callable[[], None]) -> None:
        self._device, self._check = device, check
        self._before: torch.cuda.Event | None = None

    def __call__(self) -> None:
        if self._device.type == "cuda":
            reached = torch.cuda.Event()
            reached.record(torch.cuda.current_stream(self._device))
            if self._before is not None:
                self._before.synchronize()
            self._before = reached
        self._check()
