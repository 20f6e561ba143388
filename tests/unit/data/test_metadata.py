"""A metadata file's rows: only a line feed ends one, and each that is wrong is a sentence with its line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pixtune.data.metadata import read_metadata
from pixtune.data.pairs import Pairs

LINE_ENDS = ["\u2028", "\u2029", "\x85", "\x1c", "\x1d", "\x1e", "\x0b", "\x0c"]
"""Characters beside the line feed at which `str.splitlines` cuts; JSON takes some raw, and the others as escapes."""


def read(folder: Path, text: str, ending: str = "\n") -> Pairs:
    (folder / "a.png").touch()
    (folder / "rows.jsonl").write_bytes((text + ending).encode("utf-8", "surrogatepass"))
    return read_metadata(folder / "rows.jsonl", folder)


@pytest.mark.parametrize("mark", LINE_ENDS)
@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_a_caption_may_hold_any_line_end_of_unicode(tmp_path: Path, mark: str, ending: str) -> None:
    row = {"image": "a.png", "caption": f"red{mark}and round"}
    text = ending.join([json.dumps(row, ensure_ascii=False)] * 2) if ending else json.dumps(row, ensure_ascii=False)
    found = read(tmp_path, text, ending)
    assert found.faults == ()
    assert {pair.caption for pair in found.pairs} == {f"red{mark}and round"}
    assert len(found.pairs) == (2 if ending else 1)


def test_line_numbers_count_line_feeds_alone(tmp_path: Path) -> None:
    good = json.dumps({"image": "a.png", "caption": "x\u2028y\x85z"}, ensure_ascii=False)
    (fault,) = read(tmp_path, f"{good}\n\n{good}\nnonsense").faults
    assert fault.startswith(f"{tmp_path}/rows.jsonl:4: not a JSON object")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"image": ' + "1" * 5000 + "}", "not a JSON object"),
        (r'{"image": "a.png", "caption": "a \ud800 b"}', "half a character"),
        (r'{"image": "a.png", "caption": "x", "control": ["\udfff.png"]}', "half a character"),
        (r'{"image": "a\u0000.png", "caption": "x"}', "zero byte"),
        ('{"image": "' + "x" * 5000 + '.png", "caption": "x"}', "there is no file"),
        ('{"image": "pipe.png", "caption": "x"}', "there is no file"),
        ('{"image": "..", "caption": "x"}', "there is no file"),
        ("null", "is a NoneType"),
        ('{"image": "a.png", "caption": "' + "x" * 1_100_000 + '"}', "'caption' has more than"),
        ('{"image": "a.png", "caption": "' + "x" * 3_000_000 + '"}', "is longer than 2 MiB"),
        ('{"image": "a.png", "caption": "x", "control": [' + '"a.png",' * 16 + '"a.png"]}', "lists 17 paths"),
        ('{"image": "a.png", "caption": "x", "' + "k" * 1000 + '": 1}', "unknown key 'kkk"),
        ('{"image": "a.png", "caption": 5}', "'caption' must be text"),
        ('{"image": "a.png", "caption": "red", "caption": "blue"}', "caption is given twice in one mapping: keep one"),
    ],
)
def test_a_row_that_cannot_be_used_is_a_sentence_with_its_line(tmp_path: Path, row: str, words: str) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    faults = read(tmp_path, row).faults
    assert faults and all(fault.startswith(f"{tmp_path}/rows.jsonl:1: ") for fault in faults)
    assert words in faults[0]


@pytest.mark.parametrize(
    ("on_disk", "written"), [("caf\u00e9.png", "cafe\u0301.png"), ("cafe\u0301.png", "caf\u00e9.png")]
)
def test_a_picture_is_found_however_its_accents_are_written(tmp_path: Path, on_disk: str, written: str) -> None:
    (tmp_path / on_disk).touch()
    found = read(tmp_path, json.dumps({"image": written, "caption": "a cup"}))
    assert found.faults == () and found.pairs[0].image_path.is_file()


def test_a_pipe_in_place_of_the_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    (fault,) = read_metadata(tmp_path / "rows.jsonl", tmp_path).faults
    assert "a named pipe, not a file" in fault


def test_reading_ends_after_a_thousand_problems(tmp_path: Path) -> None:
    faults = read(tmp_path, "x\n" * 100_000).faults
    assert len(faults) == 1001 and faults[-1].endswith("it was read to line 1,000.")


def test_a_folder_is_listed_once_for_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, listed, really_list = [], [], Path.iterdir
    for number in range(300):
        (tmp_path / f"cafe\u0301{number}.png").touch()
        rows.append(json.dumps({"image": f"caf\u00e9{number}.png", "caption": "a cup"}))

    def counting(path: Path):
        listed.append(path)
        return really_list(path)

    monkeypatch.setattr(Path, "iterdir", counting)
    found = read(tmp_path, "\n".join(rows))
    assert found.faults == () and len(found.pairs) == 300 and listed == [tmp_path]


# ---- several captions, Hugging Face's names, CSV


def write_rows(folder: Path, name: str, text: str) -> Pairs:
    for picture in ("a.png", "b.png", "c.png"):
        (folder / picture).write_bytes(b"")
    file = folder / name
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_metadata(file, folder)


def test_a_list_of_captions_is_one_example_with_all_of_them(tmp_path):
    (pair,) = write_rows(tmp_path, "m.jsonl", '{"image": "a.png", "caption": [" one", "two"]}').pairs
    assert (pair.caption, pair.other_captions) == ("one", ("two",))


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"image": "a.png", "caption": []}', "'caption' must be text, or a list of texts"),
        ('{"image": "a.png", "caption": ["x", 3]}', "'caption' must be text, or a list of texts"),
        ('{"image": "a.png", "caption": [' + ",".join(['"x"'] * 257) + "]}", "'caption' lists 257 captions"),
        ('{"image": "a.png", "file_name": "b.png", "text": "x"}', "unknown key 'file_name'"),
        ('{"image": "a.png", "caption": "x", "text": "y"}', "unknown key 'text'"),
    ],
)
def test_a_wrong_list_or_a_key_under_both_names_is_named(tmp_path, row, words):
    (fault,) = write_rows(tmp_path, "m.jsonl", row).faults
    assert words in fault


def test_a_csv_file_is_read_as_its_rows_in_json_are(tmp_path):
    text = '\ufefffile_name,text,tags\r\na.png,"a, ""quoted""\nline",x\r\nb.png,plain,y\r\nb.png,again,z\r\n'
    found = write_rows(tmp_path, "metadata.csv", text)
    assert [(pair.name, pair.caption) for pair in found.pairs] == [
        ("a.png", 'a, "quoted"\nline'), ("b.png", "plain"), ("b.png#2", "again"),
    ]  # fmt: skip
    assert found.faults == () and "columns that are not read: 'tags'" in found.warnings[0]
    (pair,) = write_rows(tmp_path, "m.CSV", "image,caption,control\na.png,x,b.png;c.png\n").pairs
    assert [path.name for path in pair.control_paths] == ["b.png", "c.png"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty. A first line of column names"),
        ("image,caption\n", "is empty. A first line of column names"),
        ("a.png,one\n", "m.csv:1: has no column image and caption; its columns are 'a.png', 'one'"),
        ("image,caption,image\na.png,x,b.png\n", "m.csv:1: has the column image twice"),
        ("image,file_name,caption\na.png,b.png,x\n", "m.csv:1: has the column image twice"),
        ("image,caption\na.png,x\nb.png\n", "m.csv:3: has 1 fields, and the first line names 2"),
        ('image,caption\na.png,"x\n', "m.csv:2: is not CSV (unexpected end of data)"),
        ("image,caption\nd.png,x\n", "m.csv:2: there is no file"),
        ("image,caption\n\na.png,x\0\n", "m.csv:3: "),
        (b"image,caption\na.png,\xe4\n", "m.csv:2: is not UTF-8 text (byte 0xe4 at position 6)"),
        ("image;caption\na.png;x\n", "m.csv:1: has no column image and caption; its columns are 'image;caption'"),
    ],
)
def test_a_wrong_csv_file_is_one_plain_sentence_with_its_line(tmp_path, text, words):
    (fault,) = write_rows(tmp_path, "m.csv", text).faults
    assert words in fault, fault
