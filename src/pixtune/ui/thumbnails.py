"""Small pictures for the page, made by processes apart and kept on disk."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path

from pixtune.data.pairs import PICTURE_EXTENSIONS
from pixtune.ui.answers import BadRequestError

EDGES = (320, 1280)
"""Longer sides in pixels at which pictures are shown: in a grid, and large."""
NUM_WORKERS = min(2, os.cpu_count() or 1)
IDLE_SECONDS = 30.0
"""Time after which a process that has nothing to do ends."""
MOST_SECONDS = 60.0
"""Time that one picture may take."""


class Thumbnails:
    """Makes small pictures, a few at a time, and finds those that were made before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._free = asyncio.Semaphore(NUM_WORKERS)
        self._workers: list[asyncio.subprocess.Process] = []
        """Processes that have nothing to do."""
        self._clearing: asyncio.TimerHandle | None = None
        self._making: dict[Path, asyncio.Task[str]] = {}

    async def of(self, source: Path, edge: int) -> Path:
        """Returns the file of a small picture.

        Raises:
            BadRequestError: there is no such picture, or it cannot be decoded; says why.
        """
        if source.suffix.lower().lstrip(".") not in PICTURE_EXTENSIONS or edge not in EDGES:
            raise BadRequestError("this is no picture")
        try:
            stat = source.stat()
        except OSError as error:
            raise BadRequestError(f"the picture cannot be read ({error.strerror})") from error
        name = hashlib.sha256(f"{source}\0{stat.st_size}\0{stat.st_mtime_ns}\0{edge}".encode()).hexdigest()
        target = self._folder / name[:2] / f"{name}.webp"
        if target.is_file():
            return target
        if target not in self._making:
            task = asyncio.ensure_future(self._make(source, target, edge))
            self._making[target] = task
            task.add_done_callback(lambda _: self._making.pop(target, None))
        if problem := await asyncio.shield(self._making[target]):
            raise BadRequestError(problem)
        return target

    async def _make(self, source: Path, target: Path, edge: int) -> str:
        async with self._free:
            worker = self._workers.pop() if self._workers else await self._start()
            wanted = json.dumps({"source": str(source), "target": str(target), "edge": edge})
            try:
                assert worker.stdin is not None and worker.stdout is not None
                worker.stdin.write(f"{wanted}\n".encode())
                line = await asyncio.wait_for(worker.stdout.readline(), MOST_SECONDS)
                problem = str(json.loads(line))
            except (OSError, ValueError, TimeoutError):  # it is gone, or hangs: only its own picture suffers
                with contextlib.suppress(ProcessLookupError):
                    worker.kill()
                await worker.wait()
                return "it cannot be decoded here: its decoder failed"
            self._workers.append(worker)
            self._end_later()
            return problem

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "pixtune.ui.thumbnailer", stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip

    def _end_later(self) -> None:
        if self._clearing is not None:
            self._clearing.cancel()
        self._clearing = asyncio.get_running_loop().call_later(IDLE_SECONDS, self.close)

    def close(self) -> list[asyncio.subprocess.Process]:
        """Lets the processes end that have nothing to do, and returns them."""
        ending, self._workers = self._workers, []
        for worker in ending:
            if worker.stdin is not None:
                worker.stdin.close()
        return ending

    async def end(self) -> None:
        """Ends the processes that have nothing to do."""
        if self._clearing is not None:
            self._clearing.cancel()
        for worker in self.close():
            await worker.wait()
