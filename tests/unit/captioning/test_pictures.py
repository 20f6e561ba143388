"""Which pictures are captioned, and which captions are kept."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pixtune.captioning.choosing import Choice, Overwrite, choose
from pixtune.captioning.pictures import Picture, find_pictures, only_named
from pixtune.captioning.record import RECORD, Written, add_to_record, read_records
from pixtune.errors import DataError, WriteError
from pixtune.storage.files import text_digest


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_pictures_come_with_the_place_of_their_caption(tmp_path: Path) -> None:
    touch(tmp_path, "pics/a.png", "pics/sub/b.v2.JPG", "pics/c.webp", "pics/c.TXT", "pics/d.heic", "pics/.e.png")
    touch(tmp_path, "control/a.jpg", "control/sub/b.v2.png")
    pictures, notes = find_pictures(tmp_path / "pics", ".txt", (tmp_path / "control",))
    found = {each.name: (each.caption_path.name, each.has_caption, len(each.controls)) for each in pictures}
    assert found == {
        "a.png": ("a.txt", False, 1), "c.webp": ("c.TXT", True, 0), "sub/b.v2.JPG": ("b.v2.txt", False, 1)
    }  # fmt: skip
    assert pictures[2].caption_path.parent == tmp_path / "pics" / "sub"
    assert len(notes) == 1 and "d.heic" in notes[0]


def test_a_control_that_is_missing_of_two_is_missing(tmp_path: Path) -> None:
    touch(tmp_path, "pics/a.png", "pics/b.png", "one/a.png", "one/b.png", "two/b.png")
    pictures, _ = find_pictures(tmp_path / "pics", "txt", (tmp_path / "one", tmp_path / "two"))
    assert [(each.name, each.lacks_controls) for each in pictures] == [("a.png", True), ("b.png", False)]
    assert pictures[1].all_paths == (tmp_path / "one" / "b.png", tmp_path / "two" / "b.png", pictures[1].path)


def test_controls_below_the_pictures_are_not_captioned(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "control/a.png")
    pictures, _ = find_pictures(tmp_path, "txt", (tmp_path / "control",))
    assert [each.name for each in pictures] == ["a.png"]
    apart, _ = find_pictures(tmp_path, "txt", apart=(tmp_path / "control",))
    assert apart == [Picture(tmp_path, "a.png", "", tmp_path / "a.png", tmp_path / "a.txt", False, (), True)]


@pytest.mark.parametrize(
    ("files", "extension", "message"),
    [
        (["a.txt"], "txt", "holds no picture"),
        (["a.png", "a.jpg"], "txt", "share one caption name"),
        (["a.png", "A.png"], "txt", "differ only in letter case"),
        (["a.png", "a.txt", "a.TXT"], "txt", "captions .* differ only in letter case"),
        (["a.png"], "png", "none for text"),
        (["a.png"], "", "none for text"),
        (["a.png"], "../txt", "none for text"),
    ],
)
def test_a_doubtful_place_is_a_problem(tmp_path: Path, files: list[str], extension: str, message: str) -> None:
    touch(tmp_path, *files)
    if len(os.listdir(tmp_path)) < len(files):
        pytest.skip("this file system ignores letter case")
    with pytest.raises(DataError, match=message):
        find_pictures(tmp_path, extension)


def test_missing_folders_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(DataError) as problem:
        find_pictures(tmp_path / "no", "txt", (tmp_path / "none",))
    assert len(problem.value.faults) == 2


def test_pictures_are_named_as_people_name_them(tmp_path: Path) -> None:
    pictures, _ = find_pictures(touch(tmp_path, "a.png", "one/b.png", "two/b.png", "two/c d.png"), "txt")
    assert [each.name for each in only_named(pictures, ["two\\b.png", "./a", "c d", "a.png"])] == [
        "a.png", "two/b.png", "two/c d.png"
    ]  # fmt: skip
    assert only_named(pictures, [str(tmp_path / "one" / "b.png")]) == [pictures[1]]
    labelled, _ = find_pictures(tmp_path / "one", "txt", label="first/")
    assert only_named(labelled, ["first/b"]) == only_named(labelled, ["first/b.png"]) == labelled
    with pytest.raises(DataError) as problem:
        only_named(pictures, ["b", "aa.png", "zzzz"])
    assert problem.value.faults == [
        "'b' may be one/b.png or two/b.png: name one with its folder.",
        "There is no picture 'aa.png'. Is 'a.png' meant?",
        "There is no picture 'zzzz'.",
    ]


@pytest.mark.parametrize(
    ("there", "overwrite", "expected"),
    [
        (None, "nothing", Choice.NEW),
        ("by hand", "nothing", Choice.KEPT),
        ("by hand", "own", Choice.BY_HAND),
        ("by hand", "all", Choice.AGAIN),
        ("edited", "own", Choice.BY_HAND),
        ("edited", "all", Choice.AGAIN),
        ("own", "nothing", Choice.KEPT),
        ("own", "own", Choice.DONE),
        ("own, other request", "own", Choice.AGAIN),
        ("unreadable", "own", Choice.BY_HAND),
    ],
)
def test_a_caption_by_hand_is_kept_unless_all_are_replaced(
    tmp_path: Path, there: str | None, overwrite: Overwrite, expected: Choice
) -> None:
    path, record = tmp_path / "a.txt", {}
    if there is not None:
        path.write_bytes(b"\xff\xfe" if there == "unreadable" else b"a cat\r\n")
    if there in ("edited", "own", "own, other request"):
        text = "a dog" if there == "edited" else "a cat"
        record["a.png"] = Written(text_digest(text), "before" if "other" in there else "now")
    picture = Picture(tmp_path, "a.png", "", tmp_path / "a.png", path, there is not None)
    assert choose(picture, overwrite, record, lambda picture: "now").choice is expected


def test_the_record_outlives_lines_that_were_cut(tmp_path: Path) -> None:
    add_to_record(tmp_path, {"a.png": Written("1", "x"), "b.png": Written("2", "x")})
    with (tmp_path / RECORD).open("ab") as stream:
        stream.write(b'\n{"name": "c.png", "capt')
    add_to_record(tmp_path, {"a.png": Written("3", "y")})
    add_to_record(tmp_path, {})
    assert read_records(tmp_path) == {"a.png": Written("3", "y"), "b.png": Written("2", "x")}


def test_a_strange_record_is_no_record(tmp_path: Path) -> None:
    assert read_records(tmp_path) == {}
    (tmp_path / RECORD).write_bytes(b'\xff\n[1]\n{"name": 3, "caption": "x", "request": "y"}\n' + b"[" * 100_000)
    assert read_records(tmp_path) == {}
    (tmp_path / RECORD).unlink()
    os.mkfifo(tmp_path / RECORD)
    assert read_records(tmp_path) == {}
    with pytest.raises(WriteError, match="named pipe"):
        add_to_record(tmp_path, {"a.png": Written("1", "x")})


def test_the_record_holds_no_words(tmp_path: Path) -> None:
    add_to_record(tmp_path, {"a.png": Written(text_digest("a secret"), "x")})
    assert set(json.loads((tmp_path / RECORD).read_text())) == {"name", "caption", "request"}
