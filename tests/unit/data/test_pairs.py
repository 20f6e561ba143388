"""Pictures find their captions, and everything that does not fit is reported in one go."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from pixtune.data.captions import read_caption
from pixtune.data.metadata import read_metadata
from pixtune.data.pairs import find_pairs, shorten
from pixtune.data.validate import validate_folder
from pixtune.errors import DataError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def names_of(folder: Path, **options) -> list[str]:
    found = find_pairs(folder, **options)
    assert found.faults == ()
    assert found.lone_pictures == ()
    return [pair.name for pair in found.pairs]


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "bmp", "tiff", "tif", "JPG", "Png", "TIFF"])
def test_every_extension_in_any_letter_case(tmp_path, extension):
    touch(tmp_path, f"a.{extension}", "a.txt")
    assert names_of(tmp_path) == [f"a.{extension}"]


@pytest.mark.parametrize(
    ("option", "file_name"), [("txt", "a.TXT"), (".txt", "a.txt"), ("TXT", "a.txt"), ("caption", "a.caption")]
)
def test_caption_extension_in_any_form(tmp_path, option, file_name):
    touch(tmp_path, "a.png", file_name)
    (pair,) = find_pairs(tmp_path, option).pairs
    assert pair.caption_path == tmp_path / file_name


@pytest.mark.parametrize("option", ["", ".", "png", "JPG"])
def test_a_senseless_caption_extension_is_a_fault(tmp_path, option):
    touch(tmp_path, "a.png", "a.txt")
    (fault,) = find_pairs(tmp_path, option).faults
    assert "caption_type" in fault and repr(option) in fault


def test_the_stem_ends_at_the_last_dot(tmp_path):
    touch(tmp_path, "a.1.png", "a.1.txt", "a.2.png", "a.2.txt", "v1.0/b.png", "v1.0/b.txt")
    found = find_pairs(tmp_path)
    assert found.faults == ()
    assert {pair.name: pair.caption_path for pair in found.pairs} == {
        "a.1.png": tmp_path / "a.1.txt",
        "a.2.png": tmp_path / "a.2.txt",
        "v1.0/b.png": tmp_path / "v1.0/b.txt",
    }
    assert all(pair.image_path == tmp_path / pair.name for pair in found.pairs)


def test_the_same_stem_in_two_folders_is_two_pairs_in_the_order_of_names(tmp_path):
    touch(tmp_path, "b/x.png", "b/x.txt", "a/x.jpg", "a/x.txt", "c.png", "c.txt", "B.png", "B.txt")
    assert names_of(tmp_path) == ["B.png", "a/x.jpg", "b/x.png", "c.png"]


def test_dots_in_the_folder_itself_do_no_harm(tmp_path):
    folder = tmp_path / "set.v2" / "x.y"
    touch(folder, "a.png", "a.txt")
    assert names_of(folder) == ["a.png"]


def test_hidden_files_and_system_folders_are_ignored(tmp_path):
    touch(tmp_path, "a.png", "a.txt", ".hidden.png", ".pixtune_cache/b.png", "__MACOSX/c.png", "notes.md", "Thumbs.db")
    assert names_of(tmp_path) == ["a.png"]


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path / "elsewhere", "a.png", "a.txt")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder)
    assert names_of(folder) == ["linked/a.png"]


def test_missing_folder_and_file_instead_of_folder(tmp_path):
    (fault,) = find_pairs(tmp_path / "absent").faults
    assert str(tmp_path / "absent") in fault and "does not exist" in fault
    touch(tmp_path, "a.png")
    (fault,) = find_pairs(tmp_path / "a.png").faults
    assert "is not a folder" in fault


def test_empty_folder(tmp_path):
    (fault,) = find_pairs(tmp_path).faults
    assert str(tmp_path) in fault and "holds no picture" in fault and "webp" in fault


def test_lone_pictures_and_lone_captions_are_all_reported(tmp_path):
    touch(tmp_path, "a.png", "sub/b.jpg", "c.txt", "d.png", "d.txt")
    found = find_pairs(tmp_path)
    assert [pair.name for pair in found.pairs] == ["d.png"]
    assert found.lone_pictures == (tmp_path / "a.png", tmp_path / "sub/b.jpg")
    assert found.faults == (
        f"The picture {tmp_path}/a.png has no caption {tmp_path}/a.txt.",
        f"The picture {tmp_path}/sub/b.jpg has no caption {tmp_path}/sub/b.txt.",
        f"The caption {tmp_path}/c.txt has no picture {tmp_path}/c.*.",
    )


def test_two_pictures_of_one_stem_are_one_fault(tmp_path):
    touch(tmp_path, "a.png", "a.jpg", "a.txt")
    (fault,) = find_pairs(tmp_path).faults
    assert f"{tmp_path}/a.jpg and {tmp_path}/a.png share one caption name" in fault


@pytest.mark.parametrize(
    "names",
    [
        ("a.png", "A.png", "a.txt", "A.txt"),
        ("a.png", "a.PNG", "a.txt"),
        ("a.png", "A.jpg", "a.txt", "A.txt"),
        ("a.png", "a.txt", "a.TXT"),
        ("IMG.png", "img.txt"),
        ("sub/a.png", "sub/A.txt"),
        ("Sub/a.png", "sub/a.txt"),
    ],
)
def test_names_that_differ_only_in_letter_case(tmp_path, names):
    touch(tmp_path, *names)
    if len(list(tmp_path.rglob("*.*"))) < len(names):
        pytest.skip("this file system ignores letter case")
    faults = find_pairs(tmp_path).faults
    assert faults and all("differ only in letter case" in fault for fault in faults)
    assert str(tmp_path / names[1]) in " ".join(faults)


@pytest.mark.parametrize(
    ("picture", "caption"),
    [
        ("caf\u00e9", "cafe\u0301"),
        ("cafe\u0301", "caf\u00e9"),
        ("\uac00", "\u1100\u1161"),  # Hangul
        ("sub\u00fcr/a", "subu\u0308r/a"),
        ("\u1ea5", "\u00e2\u0301"),
    ],
)
def test_composed_and_decomposed_accents_pair_under_one_name(tmp_path, picture, caption):
    folder = tmp_path / "images"
    touch(folder, f"{picture}.png", f"{caption}.txt")
    touch(tmp_path, f"control/{caption}.jpg")
    found = find_pairs(folder, control_folders=[tmp_path / "control"])
    assert found.faults == ()
    (pair,) = found.pairs
    assert pair.name == unicodedata.normalize("NFC", f"{picture}.png")
    assert pair.image_path.is_file() and pair.caption_place.is_file() and pair.control_paths[0].is_file()


def test_two_files_that_differ_in_accents_alone_are_named_apart(tmp_path):
    touch(tmp_path, "caf\u00e9.png", "cafe\u0301.png", "caf\u00e9.txt")
    if len(list(tmp_path.iterdir())) < 3:
        pytest.skip("this file system takes them for one")
    (fault,) = find_pairs(tmp_path).faults
    assert "composed or decomposed" in fault and r"'cafe\u0301.png'" in fault and r"'caf\xe9.png'" in fault


def test_names_that_case_folding_alone_makes_equal_are_not_called_equal_but_for_case(tmp_path):
    touch(tmp_path, "stra\u00dfe.png", "strasse.txt")
    (fault,) = find_pairs(tmp_path).faults
    assert "what some file systems take for letter case" in fault


@pytest.mark.parametrize("extension", ["avif", "GIF", "jfif", "HEIC"])
def test_a_caption_of_a_picture_that_is_not_read_says_so(tmp_path, extension):
    touch(tmp_path, "a.png", "a.txt", f"one.{extension}", "one.txt")
    (fault,) = find_pairs(tmp_path).faults
    assert f"Pictures with a caption are of a type that is not read: {tmp_path}/one.{extension}." in fault


# ---- folders with a purpose of their own


def test_folders_of_another_purpose_are_skipped_by_whatever_name(tmp_path):
    touch(tmp_path / "data", "a.png", "a.txt", "out/samples/x.png", "held/b.png", "held/b.txt", "control/a.png")
    (tmp_path / "link").symlink_to(tmp_path / "data" / "out")
    apart = [tmp_path / "link", tmp_path / "data" / ".." / "data" / "held", tmp_path / "data" / "control"]
    found = find_pairs(tmp_path / "data", apart=[*apart, tmp_path / "data"], control_folders=[apart[2]])
    assert (found.faults, [pair.name for pair in found.pairs]) == ((), ["a.png"])
    assert [pair.name for pair in find_pairs(tmp_path / "data" / "held", apart=apart).pairs] == ["b.png"]


def test_the_output_of_an_earlier_run_is_skipped_and_named(tmp_path):
    touch(tmp_path, "a.png", "a.txt", "old/metrics.jsonl", "old/before_after.png", "old/samples/step-000004/000.png")
    found = find_pairs(tmp_path)
    assert (found.faults, [pair.name for pair in found.pairs]) == ((), ["a.png"])
    (warning,) = found.warnings
    assert f"{tmp_path}/old is the output of a run" in warning


def test_a_link_to_a_folder_around_the_pictures_is_skipped_and_named(tmp_path):
    touch(tmp_path, "data/a.png", "data/a.txt", "other/b.png", "other/b.txt")
    (tmp_path / "data" / "up").symlink_to("..")
    (tmp_path / "data" / "root").symlink_to("/")
    (tmp_path / "data" / "x").symlink_to("y")
    (tmp_path / "data" / "y").symlink_to("x")
    found = find_pairs(tmp_path / "data")
    assert (found.faults, [pair.name for pair in found.pairs]) == ((), ["a.png"])
    assert len(found.warnings) == 2 and all("holds" in warning for warning in found.warnings)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_not_utf8_is_a_fault_and_can_be_printed(tmp_path):
    touch(tmp_path, "a.png", "a.txt")
    with open(os.path.join(os.fsencode(tmp_path), b"b\xff.png"), "wb"):
        pass
    found = find_pairs(tmp_path)
    (fault,) = found.faults
    assert "is not UTF-8" in fault and "udcff" in fault
    fault.encode()
    assert [pair.name for pair in found.pairs] == ["a.png"]


def test_unread_picture_types_are_a_warning(tmp_path):
    touch(tmp_path, "a.png", "a.txt", "b.HEIC", "c.gif")
    found = find_pairs(tmp_path)
    (warning,) = found.warnings
    assert "b.HEIC, c.gif" in warning and found.faults == ()


def test_control_pictures_are_matched_by_stem(tmp_path):
    touch(
        tmp_path, "images/a.png", "images/a.txt", "images/s/b.jpg", "images/s/b.txt", "control/a.JPG", "control/s/b.png"
    )
    found = find_pairs(tmp_path / "images", control_folders=[tmp_path / "control"])
    assert found.faults == ()
    assert [pair.control_paths for pair in found.pairs] == [
        (tmp_path / "control/a.JPG",),
        (tmp_path / "control/s/b.png",),
    ]


def test_control_faults(tmp_path):
    touch(tmp_path, *(f"images/{stem}.{end}" for stem in "abcd" for end in ("png", "txt")))
    touch(tmp_path, "control/b.png", "control/C.png", "control/d.png", "control/d.jpg", "control/e.png")
    faults = "\n".join(find_pairs(tmp_path / "images", control_folders=[tmp_path / "control"]).faults)
    assert f"The picture {tmp_path}/images/a.png has no control picture {tmp_path}/control/a.*." in faults
    assert f"The control picture {tmp_path}/control/e.png has no picture {tmp_path}/images/e.*." in faults
    assert f"images/c.png and the control picture {tmp_path}/control/C.png have names that differ only" in faults
    assert "control/d.jpg and " in faults and "belong to one target" in faults
    assert faults.count("\n") == 3


def test_a_missing_control_folder_is_one_fault(tmp_path):
    touch(tmp_path, "images/a.png", "images/a.txt", "images/b.png", "images/b.txt")
    (fault,) = find_pairs(tmp_path / "images", control_folders=[tmp_path / "control"]).faults
    assert "control folder" in fault and "does not exist" in fault


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a cat", "a cat"),
        (b"\xef\xbb\xbfa cat\r\n", "a cat"),
        ("  \n\u732b, caf\u00e9\n ".encode(), "\u732b, caf\u00e9"),
        (b"first\nsecond\n", "first\nsecond"),
        (b"", ""),
        (b" \n\t", ""),
        (b"\xef\xbb\xbf", ""),
    ],
)
def test_captions_are_utf8_with_or_without_a_mark_and_stripped(tmp_path, data, text):
    (tmp_path / "a.txt").write_bytes(data)
    assert read_caption(tmp_path / "a.txt") == text


@pytest.mark.parametrize("from_table", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "a cat\non a mat",
        "a cat\r\non a mat\r\n",
        "a cat\ron a mat\r",
        "\ufeffa cat\r\non a mat",
        "\ufeff\ufeff a cat\non a mat",
        "\r\n a cat\r\n\ufeffon a mat\ufeff",
    ],
)
def test_line_ends_and_marks_of_an_editor_are_no_part_of_a_caption(tmp_path, text, from_table):
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.png").touch()
    (tmp_path / "table.jsonl").write_text(json.dumps({"image": "a.png", "caption": text}))
    found = read_metadata(tmp_path / "table.jsonl", tmp_path) if from_table else find_pairs(tmp_path)
    (pair,) = found.pairs
    assert pair.read_caption() == "a cat\non a mat"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("caf\u00e9".encode("latin-1"), "byte 0xe9 at position 3"),
        (b"\xef\xbb\xbfab\xff", "byte 0xff at position 5"),
        ("a cat".encode("utf-16"), "UTF-16"),
        ("\u732b".encode("utf-16"), "UTF-16"),  # without a zero byte
        ("a cat".encode("utf-16-le"), "position 1"),
        (b"abc\0", "position 3"),
    ],
)
def test_other_encodings_are_faults_with_path_and_position(tmp_path, data, words):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        read_caption(path)
    (fault,) = caught.value.faults
    assert str(path) in fault and words in fault and "UTF-8" in fault


def test_a_caption_that_cannot_be_opened_is_a_fault(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(DataError, match=r"a\.txt cannot be read"):
        read_caption(tmp_path / "a.txt")


def test_shorten_says_how_many_it_left_out():
    assert shorten("abc") == "a, b, c"
    assert shorten("abcdefg") == "a, b, c, d, e and 2 more"


# ---- what is no file


def put(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.symlink_to("nowhere")


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "dangling"])
@pytest.mark.parametrize("victim", ["a.png", "a.txt", "control/a.png"])
def test_what_is_no_file_among_the_data_is_named_and_never_waited_for(tmp_path, kind, victim):
    folder = tmp_path / "images"
    for path in (folder / "a.png", tmp_path / "control" / "a.png"):
        path.parent.mkdir()
        Image.new("RGB", (32, 32)).save(path)
    (folder / "a.txt").write_text("a")
    path = tmp_path / victim if "/" in victim else folder / victim
    path.unlink()
    put(path, kind)
    report = validate_folder(folder, control_folders=[tmp_path / "control"])
    assert len(report.faults) == 1 and str(path) in report.faults[0]


def test_a_caption_that_never_ends_is_read_no_further_than_any_caption_goes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 3_000_000)
    with pytest.raises(DataError, match="more than 1 MiB"):
        read_caption(path)


# ---- a locale that is not UTF-8


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are Unicode whatever the locale")
def test_names_are_what_their_bytes_mean_whatever_the_locale_takes_them_for(tmp_path):
    touch(tmp_path, "caf\u00e9.png", "cafe\u0301.txt")
    code = (
        "import sys; from pathlib import Path; from pixtune.data.pairs import find_pairs;"
        "found = find_pairs(Path(sys.argv[1])); assert not found.faults, found.faults; (pair,) = found.pairs;"
        "assert pair.image_path.is_file() and pair.read_caption() == ''; print(ascii(pair.name))"
    )
    environment = {**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "'caf\\xe9.png'\n", done.stderr


# ---- names that steer a terminal


def test_no_name_forges_a_line_of_the_report(tmp_path):
    touch(tmp_path, "a\n  - nothing\nThe data set is fine.\n.png", "\x1b[2J\x1b]0;x\x07b.png", "c\u202egnp.txt")
    text = validate_folder(tmp_path).render()
    assert "The data set is fine." not in text.split("\n") and text.startswith("The data set cannot be trained on: ")
    assert all(mark == "\n" or mark.isprintable() for mark in text)
    assert r"\x1b[2J\x1b]0;x\x07b.png" in text and r"c\u202egnp.txt" in text


# ---- many of one mistake


def test_many_pictures_without_a_caption_are_one_problem(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.png").touch()
    (tmp_path / "0.txt").touch()
    (fault,) = find_pairs(tmp_path).faults
    listed = ", ".join(f"{tmp_path}/{number}.png" for number in range(1, 6))
    assert fault == f"8 pictures have no caption of their name (.txt): {listed} and 3 more."


def test_the_parent_of_targets_and_controls_is_one_problem_with_its_remedy(tmp_path: Path) -> None:
    for folder, extensions in (("after", ("png", "txt")), ("before", ("png",))):
        (tmp_path / folder).mkdir()
        for number, extension in itertools.product(range(8), extensions):
            (tmp_path / folder / f"{number}.{extension}").touch()
    (fault,) = find_pairs(tmp_path).faults
    assert fault.startswith(f"None of the 8 pictures in {tmp_path}/before has a caption.")
    assert f"--control-dir {tmp_path}/before" in fault and f"data_config.control_dir={tmp_path}/before" in fault


def test_a_few_masks_beside_their_pictures_are_one_problem_too(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.png", "images/a.txt", "images/b.png", "images/b.txt", "images/c.png", "masks/a.png")
    touch(tmp_path, "masks/b.png")
    masks, lacking = find_pairs(tmp_path).faults
    assert masks.startswith(f"None of the 2 pictures in {tmp_path}/masks has a caption.") and "mask_dir" in masks
    assert lacking == f"The picture {tmp_path}/images/c.png has no caption {tmp_path}/images/c.txt."


def test_a_picture_of_a_phone_and_its_caption_are_one_problem(tmp_path: Path) -> None:
    for name in ("a.png", "a.txt", "b.heic", "b.txt", "c.AVIF", "c.txt", "d.gif"):
        (tmp_path / name).touch()
    found = find_pairs(tmp_path)
    assert [fault.partition(". ")[0] for fault in found.faults] == [
        f"Pictures with a caption are of a type that is not read: {tmp_path}/b.heic, {tmp_path}/c.AVIF"
    ]
    assert len(found.warnings) == 1 and "d.gif" in found.warnings[0] and "b.heic" not in found.warnings[0]
