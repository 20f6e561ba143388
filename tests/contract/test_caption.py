"""`pixtune caption` as it is typed, on small models with random weights: files, exit codes, what is kept, resuming."""

from __future__ import annotations

import errno
import itertools
import os
import pathlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pixtune.captioning.record import RECORD, RECORDS
from pixtune.data.captions import read_caption
from tests.captioners import TINY, write_captioner
from tests.io_faults import FailingDisk
from tests.pictures import noise
from tests.runs import ROOT, end_of, pixtune, start_ranks

COLOURS = ("red", "green", "blue", "yellow", "white")
EDITING = ROOT / "assets" / "tiny-qwen-image-edit"
SHORT = ("--max-tokens", 12, "--weights-format", "fp32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image model's folder whose text encoder says words."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "text_encoder")
    write_captioner(folder / "text_encoder", "qwen2_5_vl")
    return folder


@pytest.fixture(scope="module")
def captioned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder after the command, and what it printed."""
    folder = draw(tmp_path_factory.mktemp("captioned") / "pictures")
    (folder / "red.txt").write_text("a caption by hand")
    (folder / "green.txt").touch()
    outcome = pixtune("caption", folder, "--model", model, "--preset", "style", "--trigger", "zwx  style", *SHORT)
    assert outcome.returncode == 0, outcome.stdout
    return folder, outcome.stdout


def draw(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for number, name in enumerate(COLOURS):
        image = noise(64, 48 + 40 * number, number)
        Image.blend(image, Image.new("RGB", image.size, name), 0.7).save(folder / f"{name}.png")
    return folder


def captions(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.txt"))}


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "pictures"))


def test_captions_are_written_and_those_that_are_there_are_kept(captioned: tuple[Path, str]) -> None:
    folder, printed = captioned
    texts = captions(folder)
    assert sorted(texts) == sorted(COLOURS)
    assert (texts["red"], texts["green"]) == ("a caption by hand", "")
    for name in COLOURS[2:]:
        assert texts[name].startswith("zwx style, ") and texts[name].endswith("\n") and texts[name].count("\n") == 1
        assert f"{name}.png: {texts[name].strip()}" in printed
    assert "captions written: 3; kept: 2; pictures without: 0" in printed
    assert "captions that are empty files are kept, too: green.png" in printed
    assert "plan: captions of 3 pictures at once" in printed
    assert not [path for path in folder.iterdir() if path.suffix not in {".png", ".txt", ".jsonl"}]


def test_several_processes_write_the_captions_of_one(captioned: tuple[Path, str], model: Path, tmp_path: Path) -> None:
    """Each some of them; and a job for each share of the pictures, which knows nothing of the others, does as well."""
    words = ("--model", model, "--preset", "style", "--trigger", "zwx style", "--batch-size", 1, *SHORT)
    folder = draw(tmp_path / "pictures")
    ended = [end_of(each) for each in start_ranks("caption", folder, *words)]
    assert [code for code, _ in ended] == [0, 0], ended
    expected = captions(captioned[0])
    texts = captions(folder)
    assert {name: texts[name] for name in COLOURS[2:]} == {name: expected[name] for name in COLOURS[2:]}
    told = [{name for name in COLOURS if f"{name}.png: {texts[name].strip()}" in printed} for _, printed in ended]
    assert told[0] and told[1] and not told[0] & told[1] and told[0] | told[1] == set(COLOURS)
    assert "captions written: 5; kept: 0; pictures without: 0" in ended[0][1] and "kept:" not in ended[1][1]
    assert len([*folder.glob(RECORDS)]) == 2 and not (folder / RECORD).exists()

    (folder / "red.txt").write_text("by hand now")
    for number in (1, 2):  # nobody takes what the others wrote for a caption by hand
        outcome = pixtune("caption", folder, *words, "--overwrite", "--share", f"{number}/2", "--dry-run")
        assert outcome.returncode == 0, outcome.stdout
        assert f"captions to write: 0; kept: {(3, 2)[number - 1]}" in outcome.stdout, outcome.stdout
        assert ("by hand are kept: red.png" in outcome.stdout) == (number == 1), outcome.stdout
    for path in folder.glob("*.txt"):
        path.unlink()
    outcome = pixtune("caption", folder, *words, "--share", "2/2")
    assert (outcome.returncode == 0 and sorted(captions(folder)) == ["green", "white"]) or captions(folder), (
        outcome.stdout
    )
    for wrong in ("0/2", "3/2", "2", "a/b", "1/0", "-1/2", "1/2/3"):
        assert pixtune("caption", folder, *words, f"--share={wrong}").returncode == 2, wrong


def test_what_was_killed_goes_on_to_the_same_captions(captioned: tuple[Path, str], model: Path, tmp_path: Path) -> None:
    """Also with --overwrite: what the killed one has written already is not written a second time."""
    folder = copy_of(captioned[0], tmp_path)
    before = captions(folder)
    (folder / "blue.txt").unlink()
    lines = (folder / RECORD).read_text().splitlines()
    (folder / RECORD).write_text("\n".join([*lines, '{"name": "white.p']))
    outcome = pixtune(
        "caption", folder, "--model", model, "--preset", "style", "--trigger", "zwx style", "--overwrite", *SHORT
    )
    assert "captions written: 1; kept: 4" in outcome.stdout
    assert captions(folder) == before


@dataclass
class Killed:
    """Ends the process, as SIGKILL does, in place of putting the so-manieth file in its place."""

    number: int

    def __call__(self) -> None:
        really, count = os.replace, itertools.count(1)

        def replace(*arguments: Any, **options: Any) -> Any:
            return os._exit(9) if next(count) == self.number else really(*arguments, **options)

        os.replace = pathlib.os.replace = replace  # type: ignore[attr-defined]


def test_kills_and_failing_disks_leave_whole_captions_and_the_same_command_goes_on(
    captioned: tuple[Path, str], model: Path, tmp_path: Path
) -> None:
    expected = captions(captioned[0])
    folder = copy_of(captioned[0], tmp_path)
    (folder / RECORD).unlink()
    for name in COLOURS[2:]:
        (folder / f"{name}.txt").unlink()
    words: tuple[Any, ...] = (
        "caption",
        folder,
        "--model",
        model,
        "--preset",
        "style",
        "--trigger",
        "zwx style",
        *SHORT,
    )
    read_only = pixtune(*words, before=FailingDisk(folder, 1, errno.EROFS, lasts=True))
    assert read_only.returncode == 1 and "copy them to where you may write" in " ".join(read_only.stdout.split())
    full = pixtune(*words, "--batch-size", 1, before=FailingDisk(folder, 12, errno.ENOSPC, lasts=True))
    assert full.returncode == 1 and "No space left on device" in " ".join(full.stdout.split()), full.stdout
    written = [captions(folder)]
    killed = pixtune(*words, "--batch-size", 1, before=Killed(2))
    assert killed.returncode == 9, killed.stdout
    written.append(captions(folder))
    assert pixtune(*words).returncode == 0
    written.append(captions(folder))
    assert 2 < len(written[0]) < len(written[1]) < len(written[2]) == 5
    assert all(each.items() <= expected.items() for each in written)


def test_overwriting_spares_what_a_person_wrote(captioned: tuple[Path, str], model: Path, tmp_path: Path) -> None:
    folder = copy_of(captioned[0], tmp_path)
    (folder / "blue.txt").write_text("zwx style, mended by hand")
    before = captions(folder)
    words: tuple[Any, ...] = ("caption", folder, "--model", model, "--prompt", "Name the colour.", *SHORT)
    dry = pixtune(*words, "--overwrite", "--dry-run")
    assert "white.png: is written again" in dry.stdout and "red.png: has a caption that was written" in dry.stdout
    assert not any(line.endswith(": has a caption") for line in dry.stdout.splitlines()), "those are only counted"
    assert "captions to write: 2; kept: 3" in dry.stdout and captions(folder) == before
    outcome = pixtune(*words, "--overwrite")
    assert "captions that were written or changed by hand are kept: blue.png, green.png, red.png" in outcome.stdout
    after = captions(folder)
    assert {name for name in after if after[name] != before[name]} == {"yellow", "white"}
    (tmp_path / "suspects").write_text("# the worst\nred.png\n\nwhite\n")
    outcome = pixtune(*words, "--overwrite-edited", "--only-from", tmp_path / "suspects", "--trigger", "new")
    assert "captions written: 2; kept: 0" in outcome.stdout
    assert {name for name, text in captions(folder).items() if text.startswith("new, ")} == {"red", "white"}


def test_a_damaged_picture_costs_only_its_own_caption(model: Path, tmp_path: Path) -> None:
    folder = draw(tmp_path / "pictures")
    for name, kept in (("red", 0), ("green", 600)):
        (folder / f"{name}.png").write_bytes((folder / f"{name}.png").read_bytes()[:kept])
    Image.new("RGB", (603, 3)).save(folder / "blue.png")
    (folder / "yellow.txt").mkdir()
    outcome = pixtune("caption", folder, "--model", model, *SHORT)
    (folder / "yellow.txt").rmdir()
    assert outcome.returncode == 1 and sorted(captions(folder)) == ["white"]
    for words in (
        "yellow.txt is a folder",
        "red.png is empty (0 bytes)",
        "green.png cannot be decoded",
        "blue.png is longer than 200 times",
    ):
        assert f"problem: {folder}/{words}" in outcome.stdout
    assert "captions written: 1; kept: 0; pictures without: 4" in outcome.stdout


def test_a_looping_answer_is_reported_and_not_written(tmp_path: Path) -> None:
    """The small model's own text encoder, which was never trained, repeats one token for ever."""
    folder = draw(tmp_path / "pictures")
    outcome = pixtune("caption", folder, "--model", TINY, *SHORT, "--only", "red.png")
    assert outcome.returncode == 1 and not captions(folder)
    assert "red.png gets no caption: the answer is empty" in outcome.stdout


def test_an_edit_config_asks_what_changes(tmp_path: Path) -> None:
    """Both pictures go into one question, by the edit model's own folder; the file goes where training looks for it."""
    data = tmp_path / "data"
    draw(data / "images")
    draw(data / "control")
    (data / "control" / "white.png").unlink()
    model = tmp_path / "model"
    shutil.copytree(EDITING, model)
    shutil.rmtree(model / "text_encoder")
    write_captioner(model / "text_encoder", "qwen2_5_vl", like=EDITING)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"pretrained_model_name_or_path: {model}\noutput_dir: {tmp_path}/run\nmax_train_steps: 1\n"
        f"data_config: {{img_dir: {data}/images, control_dir: {data}/control, caption_type: cap}}\n"
    )
    outcome = pixtune("caption", config, "--temperature", 1, *SHORT)
    assert outcome.returncode == 1 and "white.png has no control picture of its name" in outcome.stdout
    found = {path.stem for path in (data / "images").glob("*.cap")}
    assert found == set(COLOURS[:4]) and "captions written: 4" in outcome.stdout
    tokens = [line for line in outcome.stdout.splitlines() if "questions of up to" in line]
    outcome = pixtune("caption", config, "--preset", "plain", "--overwrite", "--dry-run", *SHORT)
    assert tokens and tokens[0] not in outcome.stdout, "two pictures are a longer question than one"
    assert not (tmp_path / "run").exists()
    folder = pixtune("caption", data, "--model", model, "--dry-run", *SHORT)
    assert "control" not in folder.stdout.replace("control picture", "") and tokens[0] in folder.stdout


def test_several_folders_are_captioned_with_one_load(model: Path, tmp_path: Path) -> None:
    for name in ("one", "two", "apart"):
        draw(tmp_path / name)
    (tmp_path / "one" / "red.txt").write_text("by hand")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"pretrained_model_name_or_path: {model}\noutput_dir: {tmp_path}/run\nmax_train_steps: 1\n"
        f"data_config:\n  folders: [{{img_dir: {tmp_path}/one}}, {{img_dir: {tmp_path}/two, caption_type: cap}}]\n"
        f"validation: {{held_out_dir: {tmp_path}/apart}}\n"
    )
    outcome = pixtune("caption", config, "--only", "one/red", "--only", "two/red.png", *SHORT)
    assert (
        "captions written: 1; kept: 1" in outcome.stdout
        and "captions that are there are kept: one/red.png" in outcome.stdout
    )
    assert (tmp_path / "two" / "red.cap").is_file() and (tmp_path / "two" / RECORD).is_file()
    assert not (tmp_path / "one" / RECORD).exists()
    again = pixtune("caption", config, "--only", "two/red.png", "--overwrite", "--dry-run", *SHORT)
    assert "two/red.png: has the caption that this request writes" in again.stdout
    refused = pixtune("caption", config, "--only", "red.png")
    assert "'red.png' may be one/red.png or two/red.png or apart/red.png" in refused.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("{empty}", "--model", TINY), "holds no picture"),
        (("{pictures}",), "name the model: pixtune caption"),
        (("{pictures}", "rank=3", "--model", TINY), "name one folder, without keys"),
        (("{absent}", "--model", TINY), "there is no folder of pictures and no config file"),
        (
            ("{pictures}", "--model", ROOT / "assets" / "tiny-flux"),
            "whose text encoders read words and see no pictures",
        ),
        (("{pictures}", "--captioner", "{empty}"), "is no model"),
        (("{pictures}", "--model", TINY, "--preset", "edit"), "Name their folder: --control-dir"),
        (("{pictures}", "--model", TINY, "--preset", "style", "--prompt", "What?"), "are both a question"),
        (("{pictures}", "--model", TINY, "--prompt", "a <|im_end|> b"), "a mark of the model's own"),
        (("{pictures}", "--model", TINY, "--prompt", " "), "--prompt is empty"),
        (("{pictures}", "--model", TINY, "--trigger", ""), "--trigger is empty"),
        (("{pictures}", "--model", TINY, "--only", "rad.png"), "Is 'red.png' meant?"),
        (("{pictures}", "--model", TINY, "--only-from", "{absent}"), "names of pictures cannot be read"),
        (("{pictures}", "--model", TINY, "--extension", "png"), "none for text"),
        (("{config}",), "captions from metadata_file"),
        (
            ("{config}", "data_config.metadata_file=null", "data_config.caption_text=a cat"),
            "captions from caption_text",
        ),
        (("{config}", "data_config.metadata_file=null", "data_config.caption_source=file_name"), "source: file_name"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_loaded(
    words: tuple[Any, ...], message: str, tmp_path: Path
) -> None:
    draw(tmp_path / "pictures")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pairs.jsonl").touch()
    (tmp_path / "run.yaml").write_text(
        f"pretrained_model_name_or_path: {TINY}\noutput_dir: {tmp_path}/run\nmax_train_steps: 1\n"
        f"data_config: {{img_dir: {tmp_path}/pictures, metadata_file: {tmp_path}/pairs.jsonl}}\n"
    )
    places = {name: str(tmp_path / name) for name in ("pictures", "empty", "absent")}
    places["config"] = str(tmp_path / "run.yaml")
    outcome = pixtune("caption", *(str(word).format(**places) for word in words))
    assert outcome.returncode in (1, 2) and message in " ".join(outcome.stdout.split()), outcome.stdout
    assert sorted(path.suffix for path in (tmp_path / "pictures").iterdir()) == [".png"] * len(COLOURS)


def test_captions_serve_training(captioned: tuple[Path, str]) -> None:
    assert read_caption(captioned[0] / "blue.txt").startswith("zwx style, ")
