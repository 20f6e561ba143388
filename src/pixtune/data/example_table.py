"""Examples, and many of them as arrays: as objects, a million would take gigabytes in each process of a run."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from pixtune.data.buckets import Framing
from pixtune.data.controls import ControlFraming
from pixtune.data.images import picture_digest
from pixtune.data.masks import MaskFile
from pixtune.data.order import ONCE, Signature, Use
from pixtune.sizes import Size

BETWEEN = b"\xff"
"""Byte between texts: none in UTF-8, and none in what `_encoded` makes of names that are none."""
DIGEST_BYTES = 32


@dataclass(frozen=True)
class Example:
    """One captioned picture."""

    name: str
    image_path: Path
    caption: str
    """Caption as it is written, the first of several: what a held-out picture is measured with."""
    framings: tuple[Framing, ...]
    """Variants that it is trained at: for each training size its own ratio alone, or one for each ratio of
    `random_ratio`; with `flip` the same again, mirrored. The first of them measures a held-out picture."""
    control_paths: tuple[Path, ...] = ()
    control_framings: tuple[tuple[ControlFraming, ...], ...] = ()
    """Framings of the control pictures, for each of `framings`."""
    use: Use = ONCE
    """Way in which epochs use it."""
    caption_forms: tuple[str, ...] = ()
    """Captions that its turns draw from; empty: `caption` alone."""
    folder: str = ""
    """Label of its folder, with which its name begins; empty where there is only one."""
    mask: MaskFile | None = None
    """Mask of the picture; None: all of it counts."""
    loss_weight: float = 1.0
    """Factor of its loss."""
    known_digests: tuple[str, ...] = ()
    """Digests of its picture's and controls' files, where they have been taken; empty: they are taken when asked."""

    @property
    def captions(self) -> tuple[str, ...]:
        """Captions that it is trained with: one of them each turn."""
        return self.caption_forms or (self.caption,)

    @cached_property
    def image_digest(self) -> str:
        """SHA-256 of the picture's file when this was first read: a run's own, whatever becomes of the file later."""
        return self.known_digests[0] if self.known_digests else picture_digest(self.image_path)

    @cached_property
    def control_digests(self) -> tuple[str, ...]:
        """SHA-256 of each control picture's file when this was first read."""
        return self.known_digests[1:] or tuple(picture_digest(path) for path in self.control_paths)

    @property
    def is_used(self) -> bool:
        """Whether epochs use it, and its loss counts."""
        return self.use.repeats > 0 and self.loss_weight > 0

    @property
    def digests_of_pictures(self) -> tuple[str, ...]:
        """SHA-256 of its picture's and controls' files when they were first read."""
        return self.image_digest, *self.control_digests

    @property
    def digests(self) -> tuple[str, ...]:
        """SHA-256 of its picture's, controls' and mask's files when they were first read."""
        return *self.digests_of_pictures, *((self.mask.digest,) if self.mask else ())

    def signature(self, variant: int) -> tuple[Size, ...]:
        """Returns the sizes of target and controls: only examples that agree in all of them fit into one batch."""
        controls = self.control_framings[variant] if self.control_paths else ()
        return (self.framings[variant].size, *(control.latents.size for control in controls))


class Examples(Sequence[Example]):
    """A sequence of examples that keeps their texts in one piece and what many have in common once.

    An element is built when it is asked for: what is changed is a copy.
    """

    def __init__(self, examples: Iterable[Example] = ()) -> None:
        self._columns = _Columns()
        self._rows: NDArray[np.int64] | None = None
        """Numbers of the columns' rows; None: all of them."""
        self.extend(examples)

    def extend(self, examples: Iterable[Example]) -> None:
        """Adds examples at the end of a sequence that is no selection of another."""
        assert self._rows is None, "others share the columns of a selection"
        for example in examples:
            self._columns.append(example)

    def __len__(self) -> int:
        return len(self._columns.kinds) if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, number: int) -> Example: ...

    @overload
    def __getitem__(self, number: slice) -> list[Example]: ...

    def __getitem__(self, number: int | slice) -> Example | list[Example]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        row = range(len(self))[number] if self._rows is None else int(self._rows[number])
        return self._columns.example(row)

    def __iter__(self) -> Iterator[Example]:
        rows = range(len(self)) if self._rows is None else map(int, self._rows)
        return map(self._columns.example, rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(other) == len(self) and all(map(Example.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, others: Sequence[Example]) -> Examples:
        joined = Examples(self)
        joined.extend(others)
        return joined

    def __repr__(self) -> str:
        return f"<{len(self)} examples>"

    def where(self, is_wanted: Callable[[Example], bool]) -> Examples:
        """Returns those that are wanted; they share what they are made of with these."""
        numbers = np.fromiter((n for n, example in enumerate(self) if is_wanted(example)), np.int64)
        chosen = Examples()
        chosen._columns, chosen._rows = self._columns, numbers if self._rows is None else self._rows[numbers]
        return chosen

    def know_digests(self, digests: Iterable[str]) -> None:
        """Takes the digests of all files, picture and controls of one example after the other, in all selections."""
        columns = self._columns
        rows = range(len(self)) if self._rows is None else map(int, self._rows)
        columns.digests = columns.digests or bytearray(DIGEST_BYTES * columns.num_files)
        given = iter(digests)
        for row in rows:
            first, end = columns.files_of(row)
            for number in range(first, end):
                columns.digests[DIGEST_BYTES * number : DIGEST_BYTES * (number + 1)] = bytes.fromhex(next(given))


def chosen_from(examples: Sequence[Example], is_wanted: Callable[[Example], bool]) -> Sequence[Example]:
    """Returns the examples that are wanted, as compact as they were."""
    return examples.where(is_wanted) if isinstance(examples, Examples) else [*filter(is_wanted, examples)]


def signatures_of(examples: Iterable[Example]) -> list[list[Signature]]:
    """Returns the sizes of each example's variants; equal ones are one object."""
    known: dict[tuple[object, object], list[Signature]] = {}
    found = []
    for example in examples:
        key = example.framings, example.control_framings
        if key not in known:
            known[key] = [example.signature(variant) for variant in range(len(example.framings))]
        found.append(known[key])
    return found


@dataclass(frozen=True)
class _Kind:
    """Properties that examples may have in common."""

    framings: tuple[Framing, ...]
    control_framings: tuple[tuple[ControlFraming, ...], ...]
    use: Use
    folder: str
    loss_weight: float
    num_controls: int
    mask: MaskFile | None
    """Mask without its path."""


@dataclass
class _Columns:
    """Rows of examples, which are only added to."""

    texts: bytearray = field(default_factory=bytearray)
    """Name, path, caption, controls, mask and forms of the caption of one example after the other."""
    ends: array[int] = field(default_factory=lambda: array("q", [0]))
    """Places in `texts` where each example's begin, and where the last one's end."""
    kinds: array[int] = field(default_factory=lambda: array("i"))
    """Number of each example's kind."""
    first_files: array[int] = field(default_factory=lambda: array("q"))
    """Number of each example's first file among all."""
    num_files: int = 0
    digests: bytearray = field(default_factory=bytearray)
    """SHA-256 of each file; empty: they have not been taken."""
    known: list[_Kind] = field(default_factory=list)
    numbers: dict[_Kind, int] = field(default_factory=dict)

    def append(self, example: Example) -> None:
        mask = example.mask and replace(example.mask, path=Path())
        kind = _Kind(
            example.framings, example.control_framings, example.use, example.folder, example.loss_weight,
            len(example.control_paths), mask,
        )  # fmt: skip
        number = self.numbers.setdefault(kind, len(self.known))
        if number == len(self.known):
            self.known.append(kind)
        paths = [example.image_path, *example.control_paths, *([example.mask.path] if example.mask else [])]
        forms = () if example.caption_forms == (example.caption,) else example.caption_forms
        texts = [example.name, example.caption, *map(str, paths), *forms]
        if example.caption_forms and not forms:
            texts.append(SAME)
        self.texts += BETWEEN.join(map(_encoded, texts))
        self.ends.append(len(self.texts))
        self.kinds.append(number)
        self.first_files.append(self.num_files)
        num_files = 1 + len(example.control_paths)
        self.num_files += num_files
        if example.known_digests:
            missing = DIGEST_BYTES * (self.num_files - num_files) - len(self.digests)
            self.digests += bytes(missing) + bytes.fromhex("".join(example.known_digests))
        elif self.digests:
            self.digests += bytes(DIGEST_BYTES * num_files)

    def files_of(self, row: int) -> tuple[int, int]:
        first = self.first_files[row]
        return first, first + 1 + self.known[self.kinds[row]].num_controls

    def example(self, row: int) -> Example:
        """Builds an example."""
        kind = self.known[self.kinds[row]]
        data = bytes(memoryview(self.texts)[self.ends[row] : self.ends[row + 1]])
        name, caption, path, *more = [each.decode("utf-8", "surrogatepass") for each in data.split(BETWEEN)]
        controls, more = more[: kind.num_controls], more[kind.num_controls :]
        mask = kind.mask
        if mask is not None:
            mask, more = replace(mask, path=Path(more[0])), more[1:]
        return Example(
            name=name,
            image_path=Path(path),
            caption=caption,
            framings=kind.framings,
            control_paths=tuple(map(Path, controls)),
            control_framings=kind.control_framings,
            use=kind.use,
            caption_forms=(caption,) if more == [SAME] else tuple(more),
            folder=kind.folder,
            mask=mask,
            loss_weight=kind.loss_weight,
            known_digests=self._digests_of(row) if self.digests else (),
        )

    def _digests_of(self, row: int) -> tuple[str, ...]:
        """Returns the digests of an example's files; none where they have not been taken."""
        places = range(*self.files_of(row))
        digests = [self.digests[DIGEST_BYTES * place : DIGEST_BYTES * (place + 1)] for place in places]
        return () if _UNKNOWN in digests else tuple(digest.hex() for digest in digests)


_UNKNOWN = bytearray(DIGEST_BYTES)
SAME = "\0"
"""Stands for forms of a caption that are the caption alone; no caption is that."""


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
