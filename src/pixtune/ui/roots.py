"""Chosen folders, outside of which the page reads and writes nothing, and the places that stand for paths within them.

A place is text such as "here/datasets/cat": the name of a root, then a path below it. URLs hold places alone.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from pixtune.errors import PixtuneError

HOME = "here"
"""Name of the first root, to which configs, data sets and runs of the page go."""


class OutsideError(PixtuneError):
    """A path that lies in none of the chosen folders, or a place that stands for none."""


class Roots:
    """The chosen folders by name; the first is `HOME`."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders: dict[str, Path] = {}
        for folder in folders:
            name = HOME if not self.folders else folder.name or "disk"
            number = 2
            while name in self.folders:
                name, number = f"{folder.name}-{number}", number + 1
            self.folders[name] = Path(os.path.realpath(folder))

    @property
    def home(self) -> Path:
        return self.folders[HOME]

    def find(self, place: str) -> Path:
        """Returns the real path that a place stands for, links followed; it need not exist.

        Raises:
            OutsideError: it lies in none of the chosen folders, or is no place.
        """
        name, _, below = place.partition("/")
        root = self.folders.get(name)
        if root is None or "\0" in below or len(place) > 4096:
            raise OutsideError(f"there is no chosen folder named {name[:80]!r}; there are {', '.join(self.folders)}")
        try:
            path = Path(os.path.realpath(f"{root}/{below}"))
        except (OSError, ValueError) as error:
            raise OutsideError(f"{place[:200]!r} is no path here ({error})") from error
        if not self.holds(path):
            raise OutsideError(f"{place[:200]!r} leads out of the folders that this page may open")
        return path

    def holds(self, path: Path) -> bool:
        """Returns whether a path lies in one of the chosen folders once its links are followed."""
        real = Path(os.path.realpath(path))
        return any(real.is_relative_to(root) for root in self.folders.values())

    def places_of(self, paths: Iterable[Path]) -> list[str]:
        """Returns the places of files, "" for those outside the chosen folders; follows a folder's links once."""
        of_folder: dict[str, str] = {}
        places = []
        for path in paths:
            folder, name = os.path.split(path)
            try:
                if os.path.islink(path):
                    places.append(self.place_of(path))
                    continue
                if folder not in of_folder:
                    of_folder[folder] = self.place_of(Path(folder))
                places.append(f"{of_folder[folder]}/{name}")
            except OutsideError:
                places.append("")
        return places

    def place_of(self, path: Path) -> str:
        """Returns the place of a path.

        Raises:
            OutsideError: it lies in none of the chosen folders; names the option that adds it.
        """
        real = Path(os.path.realpath(path))
        within = [(name, root) for name, root in self.folders.items() if real.is_relative_to(root)]
        if not within:
            raise OutsideError(
                f"{path} lies outside the folders that this page may open. Start it as pixtune ui --root "
                f"{shlex.quote(str(real.parent))} to add it."
            )
        name, root = max(within, key=lambda each: len(each[1].parts))
        below = real.relative_to(root).as_posix()
        return name if below == "." else f"{name}/{below}"
