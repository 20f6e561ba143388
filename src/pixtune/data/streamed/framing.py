"""Makes examples of a stream's rows: each is used once an epoch, so its framing and caption are drawn beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from pixtune.config.folders import Folder
from pixtune.data.buckets import build_buckets
from pixtune.data.captions import forms_of, with_prefix
from pixtune.data.controls import ControlRules
from pixtune.data.example_table import Example
from pixtune.data.examples import Framings, framer
from pixtune.data.order import Use
from pixtune.data.streamed.windows import StreamRow, draw_caption, draw_variant
from pixtune.errors import DataError


@dataclass(frozen=True)
class Framer:
    """Maker of examples from rows.

    Args:
        place_of: function from the digest of a picture to its file, which may be gone already.
    """

    folder: Folder
    multiple: int
    rules: ControlRules | None
    seed: int
    shard_names: Sequence[str]
    place_of: Callable[[str], Path]

    @cached_property
    def _framings(self) -> Callable[..., Framings]:
        return _framings_of(self.folder, self.multiple, self.rules)

    @cached_property
    def _plain_framings(self) -> Callable[..., Framings]:
        folder = self.folder
        plain = replace(
            folder, random_ratio=False, flip=False, img_sizes=folder.img_sizes[:1], size_shares=(1.0,)
        )  # fmt: skip
        return _framings_of(plain, self.multiple, self.rules)

    def name_of(self, row: StreamRow) -> str:
        """Returns a row's name: the same wherever the shards lie."""
        return f"{self.folder.label}{self.shard_names[row.place.shard]}:{row.place.row}"

    def example(self, row: StreamRow) -> Example:
        """Frames a row as its epoch uses it."""
        framings = self._framings(row.size, *(size for _, size in row.controls))
        use, num_variants = Use(shares=framings.shares), len(framings.target)
        variant = draw_variant(row.place, self.seed, use, num_variants)
        forms = forms_of(row.captions, self.folder.captions, self.seed, self.name_of(row))
        form = forms[draw_caption(row.place, self.seed, len(forms))]
        return self._built(row, framings, variant, form)

    def held_out(self, row: StreamRow) -> Example:
        """Frames a row that is measured: with its own ratio and first caption."""
        framings = self._plain_framings(row.size, *(size for _, size in row.controls))
        return self._built(row, framings, 0, with_prefix(row.captions[0], self.folder.captions))

    def _built(self, row: StreamRow, framings: Framings, variant: int, caption: str) -> Example:
        digests = [digest for digest, _ in row.controls]
        return Example(
            name=self.name_of(row),
            image_path=self.place_of(row.digest),
            caption=caption,
            framings=(framings.target[variant],),
            control_paths=tuple(map(self.place_of, digests)),
            control_framings=(framings.controls[variant],) if row.controls else (),
            use=Use(caption_dropout_rate=self.folder.caption_dropout_rate),
            caption_forms=(caption,),
            folder=self.folder.label,
            known_digests=(row.digest, *digests),
        )

    def located(self, example: Example) -> Example:
        """Returns an example with the places that its pictures have now."""
        first, *others = example.known_digests
        return replace(example, image_path=self.place_of(first), control_paths=tuple(map(self.place_of, others)))


def _framings_of(folder: Folder, multiple: int, rules: ControlRules | None) -> Callable[..., Framings]:
    try:
        buckets = [build_buckets(size, multiple) for size in folder.img_sizes]
    except ValueError as error:
        raise DataError("pictures of this size cannot be trained on", [f"{folder.rules_place}.{error}"]) from error
    return framer(buckets, folder, rules)
