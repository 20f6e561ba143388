"""Hugging Face data sets and Parquet files as folders of a run."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pixtune.config.folders import DatasetColumns, folders_of
from pixtune.config.sections import DataConfig
from pixtune.data.captions import LARGEST_CAPTION_BYTES, MOST_CAPTIONS
from pixtune.data.example_table import Example
from pixtune.data.examples import read_examples
from pixtune.data.hf_datasets import files_in, is_saved, of_split, pair_of
from pixtune.data.images import open_rgb
from pixtune.data.metadata import MOST_CONTROLS
from pixtune.data.pairs import Pair
from pixtune.errors import DataError

needs_the_package = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="the optional package datasets is not installed"
)
COLOURS = [(255, 0, 0), (0, 128, 0), (0, 0, 255)]


def png(colour: tuple[int, int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (48, 32), colour).save(stream, "PNG")
    return stream.getvalue()


def rows() -> Any:
    import datasets

    pictures = [{"bytes": png(colour), "path": None} for colour in COLOURS]
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "other": datasets.Value("int64"),
         "many": datasets.List(datasets.Value("string")), "controls": datasets.List(datasets.Image())}
    )  # fmt: skip
    values = {"image": pictures, "text": ["red", "green ", "blue"], "other": [1, 2, 3],
              "many": [["a", "b"], ["c"], ["d"]], "controls": [pictures[1:], pictures[:1], pictures[:1]]}  # fmt: skip
    return datasets.Dataset.from_dict(values, features=features)


def read(tmp_path: Path, name: object, **keys: object) -> Sequence[Example]:
    data = {
        "folders": [{"dataset": str(name), "name": "set", **keys}],
        "cache_dir": str(tmp_path / "c"),
        "img_size": 32,
    }
    return read_examples(folders_of(DataConfig.model_validate(data)), 16)


@needs_the_package
@pytest.mark.parametrize("num_shards", [1, 2])
def test_webdataset_shards_are_read_in_their_order(num_shards, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    place = tmp_path / "shards"
    place.mkdir()
    for shard, colours in enumerate([COLOURS] if num_shards == 1 else [COLOURS[:2], COLOURS[2:]]):
        with tarfile.open(place / f"{shard:03d}.tar", "w") as file:
            for number, colour in enumerate(colours):
                for ending, content in (("png", png(colour)), ("txt", f"{colour}".encode())):
                    member = tarfile.TarInfo(f"{shard}{number}.{ending}")
                    member.size = len(content)
                    file.addfile(member, io.BytesIO(content))
    columns = {"image_column": "png", "caption_column": "txt"}
    examples = read(tmp_path, place if num_shards == 2 else place / "000.tar", **columns)
    assert [each.caption for each in examples] == [f"{colour}" for colour in COLOURS]
    assert [open_rgb(each.image_path).getpixel((5, 5)) for each in examples] == COLOURS
    with pytest.raises(DataError) as caught:
        read(tmp_path, place)
    assert "no column 'image' and 'text'; it has png, txt" in "\n".join(caught.value.faults)


@needs_the_package
@pytest.mark.parametrize("form", ["saved", "split", "parquet", "folder"])
def test_pictures_within_a_data_set_become_files_by_content(tmp_path, form):
    import datasets

    place = tmp_path / "set"
    if form == "saved":
        rows().save_to_disk(place)
    elif form == "split":
        datasets.DatasetDict({"train": rows(), "test": rows().select([0])}).save_to_disk(place)
    else:
        place = tmp_path / "set.parquet" if form == "parquet" else tmp_path / "set" / "data" / "0.parquet"
        place.parent.mkdir(parents=True, exist_ok=True)
        rows().to_parquet(place)
    examples = read(tmp_path, tmp_path / "set" if form == "folder" else place)
    assert [(each.name, each.caption) for each in examples] == [
        ("set/row 0", "red"), ("set/row 1", "green"), ("set/row 2", "blue"),
    ]  # fmt: skip
    assert [open_rgb(each.image_path).getpixel((5, 5)) for each in examples] == COLOURS
    assert all(each.image_path.name == each.image_digest for each in examples)
    before = {each.image_path: each.image_path.stat().st_mtime_ns for each in examples}
    again = read(tmp_path, tmp_path / "set" if form == "folder" else place)
    assert {each.image_path: each.image_path.stat().st_mtime_ns for each in again} == before, "nothing is written twice"


@needs_the_package
def test_columns_hold_lists_of_captions_and_of_controls(tmp_path):
    from pixtune.data.controls import ControlRules

    rows().save_to_disk(tmp_path / "set")
    data = DataConfig.model_validate(
        {"folders": [{"dataset": str(tmp_path / "set"), "caption_column": "many", "control_column": "controls"}],
         "cache_dir": str(tmp_path / "c"), "img_size": 32}
    )  # fmt: skip
    first, *_ = read_examples(folders_of(data), 16, ControlRules(2, lambda size: (32, 32), None))
    assert first.captions == ("a", "b") and first.caption == "a"
    assert [open_rgb(path).getpixel((5, 5)) for path in first.control_paths] == COLOURS[1:]


@needs_the_package
@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"image_column": "img"}, "has no column 'img'; it has image, text, other"),
        ({"caption_column": "other"}, "row 0: 'other' holds int, and a text"),
        ({"image_column": "text"}, "row 0: 'text' names the file 'red', which does not exist"),
        ({"image_column": "controls"}, "row 0: 'controls' holds 2 pictures, and one is needed"),
        ({"dataset_split": "tset"}, "has no split 'tset'; it has train. Set dataset_split"),
    ],
)
def test_what_is_wrong_with_a_data_set_is_named(tmp_path, keys, words):
    import datasets

    datasets.DatasetDict({"train": rows()}).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError) as caught:
        read(tmp_path, tmp_path / "set", **keys)
    assert words in "\n".join(caught.value.faults), caught.value.faults


@needs_the_package
def test_what_is_no_data_set_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    for name, words in (("empty", "neither a folder that save_to_disk wrote"), ("none", "no such file or folder"),
                        ("bad.parquet", "by the package datasets: ")):  # fmt: skip
        with pytest.raises(DataError) as caught:
            read(tmp_path, tmp_path / name)
        assert words in "\n".join(caught.value.faults)


# ---- what needs no package: rows as the package hands them over, and the files of a folder

COLUMNS = DatasetColumns("some/set", "train", "image", "text", "controls")


def stored(number: int, path: str | None = None) -> dict[str, Any]:
    return {"bytes": png(COLOURS[number]), "path": path}


def test_a_row_becomes_files_by_content_beside_those_that_are_files_already(tmp_path):
    (tmp_path / "own.png").write_bytes(png(COLOURS[2]))
    own, pictures = str(tmp_path / "own.png"), tmp_path / "pictures"
    row = {
        "image": stored(0, "of/another/machine.png"),
        "text": [" a", "b c\n"],
        "controls": [stored(1), own, {"path": own}],
    }
    pair = pair_of(row, COLUMNS, pictures, "row 7")
    assert isinstance(pair, Pair) and (pair.name, pair.caption, pair.other_captions) == ("row 7", "a", ("b c",))
    first, *others = pair.control_paths
    assert [open_rgb(path).getpixel((5, 5)) for path in (pair.image_path, first)] == COLOURS[:2]
    assert [path.name for path in (pair.image_path, first)] == [
        hashlib.sha256(png(colour)).hexdigest() for colour in COLOURS[:2]
    ]
    assert others == [Path(own)] * 2 and len([*pictures.rglob("*")]) == 4, "two files, each in a folder of its own"
    alone = pair_of({**row, "image": own, "text": "c"}, replace(COLUMNS, control=None), pictures, "row 8")
    assert isinstance(alone, Pair)
    assert (alone.image_path, alone.caption, alone.other_captions, alone.control_paths) == (Path(own), "c", (), ())
    (cut := pair.image_path).write_bytes(png(COLOURS[0])[:40])
    pair_of(row, COLUMNS, pictures, "row 7")
    assert cut.read_bytes() == png(COLOURS[0]), "what a crash had cut off is written again"


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({"image": None}, ["'image' holds no picture"]),
        ({"image": {"bytes": b"", "path": None}}, ["'image' holds no picture"]),
        ({"image": {"bytes": None, "path": "away.png"}}, ["'image' names the file 'away.png', which does not exist"]),
        ({"image": []}, ["'image' holds 0 pictures, and one is needed"]),
        ({"image": [stored(0), stored(1)]}, ["'image' holds 2 pictures, and one is needed"]),
        ({"controls": [stored(0), 5]}, ["'controls' holds no picture"]),
        (
            {"controls": [stored(0)] * (MOST_CONTROLS + 1)},
            [f"'controls' holds {MOST_CONTROLS + 1} pictures, more than"],
        ),
        ({"text": 5}, ["'text' holds int, and a text"]),
        ({"text": None}, ["'text' holds NoneType, and a text"]),
        ({"text": []}, ["'text' holds list, and a text"]),
        ({"text": ["a", 5]}, ["'text' holds list, and a text"]),
        ({"text": ["a"] * (MOST_CAPTIONS + 1)}, [f"'text' holds more than {MOST_CAPTIONS} captions"]),
        ({"text": "a" * (LARGEST_CAPTION_BYTES + 1)}, ["or one that no model reads"]),
        ({"image": 5, "text": 5}, ["'image' holds no picture", "'text' holds int"]),
    ],
)
def test_all_that_is_wrong_with_a_row_is_said_together(changes, problems, tmp_path):
    found = pair_of({"image": stored(0), "text": "a", "controls": [], **changes}, COLUMNS, tmp_path, "row 0")
    assert isinstance(found, list) and len(found) == len(problems)
    assert all(words in problem for words, problem in zip(problems, found, strict=True)), found


def test_the_files_of_a_folder_are_those_of_one_form_in_the_order_of_their_names(tmp_path):
    with pytest.raises(DataError) as caught:
        files_in(tmp_path)
    assert "nor one of Parquet files or WebDataset shards" in caught.value.faults[0]
    (tmp_path / "data").mkdir()
    for name in ("2.tar", "data/1.tar", "10.tar", "notes.txt"):
        (tmp_path / name).touch()
    assert files_in(tmp_path) == [tmp_path / name for name in ("10.tar", "2.tar", "data/1.tar")]
    (tmp_path / "data" / "b.parquet").touch()
    (tmp_path / "a.parquet").touch()
    assert files_in(tmp_path) == [tmp_path / "a.parquet", tmp_path / "data" / "b.parquet"]
    assert not is_saved(tmp_path)
    for name in ("state.json", "dataset_dict.json"):
        (tmp_path / "data" / name).touch()
        assert is_saved(tmp_path / "data")
        (tmp_path / "data" / name).unlink()


def test_a_split_is_chosen_by_its_name_and_a_single_table_is_the_split():
    assert of_split("a table", COLUMNS) == "a table"
    assert of_split({"test": 1, "train": 2}, COLUMNS) == 2
    with pytest.raises(DataError) as caught:
        of_split({"test": 1, "validation": 2}, COLUMNS)
    assert "has no split 'train'; it has test, validation. Set dataset_split." in caught.value.faults[0]


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the package is installed")
def test_without_the_package_the_command_that_installs_it_is_named(tmp_path):
    with pytest.raises(DataError, match=r"pip install 'pixtune\[datasets\]'"):
        read(tmp_path, "some/set")
