"""The ways in which a folder's pictures, captions and controls may lie on disk. Needs neither torch nor Pillow."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from pixtune.config.folders import Folder
from pixtune.data.captions import caption_without_file
from pixtune.data.hf_datasets import read_dataset
from pixtune.data.metadata import read_metadata
from pixtune.data.pairs import Pairs, find_pairs


def find_examples(folder: Folder, apart: Collection[Path] = ()) -> Pairs:
    """Finds the files that belong together in a folder, by its layout.

    Args:
        apart: `examples.folders_apart`, which are skipped within the folder.
    """
    if folder.dataset is not None:
        return read_dataset(folder.dataset, folder.img_dir)
    if folder.metadata_file is not None:
        return read_metadata(folder.metadata_file, folder.img_dir)
    return find_pairs(
        folder.img_dir,
        folder.captions.extension,
        folder.control_dirs,
        folder.allow_missing_controls,
        apart,
        caption_without_file(folder.captions),
    )
