"""A checkpoint of all weights, whole or in pieces, compared with the live tensors, and files that are damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixtune.engine.sharding import Rows
from pixtune.errors import WeightsError
from pixtune.storage.slices import OFFSETS_KEY, slice_metadata
from pixtune.trained.read_back import drawn_names, read_back_sample

LIVE = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(number))
    for number, (name, shape) in enumerate({"a": (5, 3), "b": (4,), "c": (6, 2)}.items())
}
CUT = {"a": 2, "c": 4}
"""Tensors in two pieces, each with the first row of the second one."""


def write(folder: Path, **changed: Tensor) -> list[Path]:
    """Writes the tensors as two processes do."""
    tensors = {**LIVE, **changed}
    pieces: tuple[dict[str, tuple[int, Tensor]], ...] = (
        {name: (0, tensors[name][:row]) for name, row in CUT.items()},
        {name: (row, tensors[name][row:]) for name, row in CUT.items()},
    )
    paths = [folder / f"weights-{number}.safetensors" for number in range(3)]
    for path, own in zip(paths[:2], pieces, strict=True):
        parts = {name: piece.contiguous() for name, (_, piece) in own.items()}
        save_file(parts, path, slice_metadata({name: first for name, (first, _) in own.items()}, parts))
    save_file({"b": tensors["b"]}, paths[2])
    return paths


WHOLE = {name: Rows(tuple(tensor.shape), 0, len(tensor)) for name, tensor in LIVE.items()}
SOME = {"a": Rows((5, 3), 1, 4), "b": Rows((4,), 2, 4), "c": Rows((6, 2), 4, 6)}
"""Rows of a process that holds some: across both pieces, of a whole tensor, and of the second piece alone."""


def live(rows: dict[str, Rows]) -> Callable[[str], Tensor]:
    return lambda name: rows[name].of(LIVE[name])


@pytest.mark.parametrize("rows", [WHOLE, SOME, {"b": WHOLE["b"]}], ids=["whole", "some rows", "one tensor"])
def test_tensors_are_equal_however_files_and_processes_cut_them(rows: dict[str, Rows], tmp_path: Path) -> None:
    found = read_back_sample(live(rows), rows, write(tmp_path))
    assert (found.unequal, found.distance, found.effect) == ((), 0, 1)


def test_tensors_of_which_one_number_differs_are_named(tmp_path: Path) -> None:
    changed = {name: tensor.clone() for name, tensor in LIVE.items()}
    changed["c"][5, 1] += 1e-6
    changed["a"][0, 0] = torch.nan
    found = read_back_sample(live(WHOLE), WHOLE, write(tmp_path, **changed))
    assert found.unequal == ("a", "c") and found.distance == pytest.approx(2 / 3)
    found = read_back_sample(live(SOME), SOME, write(tmp_path, **changed))
    assert found.unequal == ("c",), "the other number is not one of this process's rows"


def remove(paths: list[Path]) -> None:
    paths[2].unlink()


def cut(paths: list[Path]) -> None:
    paths[0].write_bytes(paths[0].read_bytes()[:-4])


def lose_places(paths: list[Path]) -> None:
    save_file(load_file(paths[1]), paths[1], {OFFSETS_KEY: "[1]"})


def overlap(paths: list[Path]) -> None:
    parts = load_file(paths[1])
    save_file(parts, paths[1], slice_metadata({"a": 1, "c": 4}, parts))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove, r"weights-2\.safetensors cannot be read"),
        (cut, r"weights-0\.safetensors cannot be read"),
        (lose_places, r"weights-1\.safetensors does not say where its pieces of tensors belong"),
        (overlap, "the rows of a from 1 on are missing, or do not fit together"),
        (lambda paths: paths.pop(), r"no file of \['weights-0\.safetensors', 'weights-1\.safetensors'\] holds b"),
        (lambda paths: paths.pop(0), "the rows of a from 0 on are missing"),
    ],
)
def test_files_that_cannot_be_compared_are_named(
    damage: Callable[[list[Path]], object], words: str, tmp_path: Path
) -> None:
    damage(paths := write(tmp_path))
    with pytest.raises(WeightsError, match=words):
        read_back_sample(live(WHOLE), WHOLE, paths)


def test_the_same_few_names_are_drawn_each_time_and_others_with_another_seed() -> None:
    names = [f"block.{number}" for number in range(50)]
    drawn = drawn_names(names, 7, 5)
    assert len(set(drawn)) == 5 and set(drawn) < set(names)
    assert drawn == drawn_names(names[::-1], 7, 5) != drawn_names(names, 8, 5)
    assert sorted(drawn_names(names, 7, 99)) == sorted(names)
