"""The report on a data set: what it counts, what it warns of, both layouts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from pixtune.data import scan
from pixtune.data.caption_tokens import CaptionCounter
from pixtune.data.images import Decoded, decode
from pixtune.data.validate import validate_dataset, validate_folder
from pixtune.families import family_of
from pixtune.storage.model_folder import ModelFolder
from tests.pictures import save_pair
from tests.runs import ROOT, pixtune
from utils import validate_dataset as script


def test_a_good_folder_has_no_faults_and_no_warnings(tmp_path):
    save_pair(tmp_path, "a.png", 1, "short")
    save_pair(tmp_path, "sub/b.jpg", 2, "a longer caption")
    report = validate_folder(tmp_path)
    assert report.ok and report.faults == () and report.warnings == ()
    assert report.num_pictures == 2
    longest = report.longest_caption
    assert longest is not None and longest.path == tmp_path / "sub/b.txt" and longest.num_characters == 16
    assert report.bucket_counts == {}
    text = report.render()
    assert "2 pictures" in text and "16 characters" in text and text.startswith("The data set is fine.")


def test_a_picture_that_is_replaced_while_it_is_checked_is_a_fault(tmp_path, monkeypatch):
    """Its size would be of one picture and its digest of the other, so a run would cut a part that is not there."""
    save_pair(tmp_path, "a.png", 1)

    def replaced_once_it_was_decoded(path: Path) -> AbstractContextManager[Decoded]:
        picture = decode(path)
        Image.new("RGB", (8, 8)).save(path)
        return nullcontext(picture)

    monkeypatch.setattr(scan, "decoded", replaced_once_it_was_decoded)
    (fault,) = validate_folder(tmp_path).faults
    assert fault.startswith(f"{tmp_path / 'a.png'} has other content than when it was first read")


def test_bucket_counts(tmp_path):
    for seed, size in enumerate([(128, 128), (200, 200), (256, 128), (300, 150)]):
        save_pair(tmp_path, f"{seed}.png", seed, size=size)
    report = validate_folder(tmp_path, img_size=64, multiple=16)
    assert report.bucket_counts == {(64, 64): 2, (80, 48): 2}
    assert "64 x 64: 2, 80 x 48: 2" in report.render()


def test_small_pictures_are_named_with_their_training_size(tmp_path):
    save_pair(tmp_path, "small.png", 1, size=(70, 50))
    save_pair(tmp_path, "large.png", 2, size=(300, 300))
    report = validate_folder(tmp_path, img_size=256)
    (warning,) = report.warnings
    assert f"{tmp_path}/small.png (64x48)" in warning and "large.png" not in warning and "not enlarged" in warning
    assert report.bucket_counts == {(64, 48): 1, (256, 256): 1}


def test_a_bucket_that_is_small_by_rounding_is_not_called_small(tmp_path):
    save_pair(tmp_path, "a.png", size=(600, 200))
    report = validate_folder(tmp_path, img_size=64)
    ((width, height),) = report.bucket_counts
    assert width * height < 0.9 * 64**2 and report.warnings == ()


def test_pictures_with_faults_are_in_no_bucket(tmp_path):
    save_pair(tmp_path, "a.png", 1, size=(64, 64))
    save_pair(tmp_path, "tiny.png", 2, size=(9, 9))
    save_pair(tmp_path, "broken.png", 3).write_bytes(b"")
    report = validate_folder(tmp_path, img_size=64)
    assert len(report.faults) == 2 and report.bucket_counts == {(64, 64): 1}


def test_enlarged_pictures_are_named_with_the_factor(tmp_path):
    save_pair(tmp_path, "small.png", 1, size=(64, 64))
    (warning,) = validate_folder(tmp_path, img_size=256, upscale=True).warnings
    assert f"{tmp_path}/small.png (4.00x)" in warning and "enlarged to reach img_size 256" in warning


def test_a_picture_a_few_pixels_short_is_not_worth_a_warning(tmp_path):
    save_pair(tmp_path, "a.png", 1, size=(1020, 1020))
    report = validate_folder(tmp_path, img_size=1024)
    assert report.warnings == () and report.bucket_counts == {(1008, 1008): 1}


def test_heavy_crops_are_named_with_the_share(tmp_path):
    save_pair(tmp_path, "a.png", 1, size=(1000, 100))
    (warning,) = validate_folder(tmp_path, img_size=64).warnings
    assert f"{tmp_path}/a.png (60%)" in warning


def test_duplicates_are_named_together(tmp_path):
    for name in ("a.png", "b.png", "c/d.png"):
        save_pair(tmp_path, name, seed=1)
    save_pair(tmp_path, "e.png", seed=2)
    (warning,) = validate_folder(tmp_path).warnings
    assert warning == f"These pictures are the same file: {tmp_path}/a.png, {tmp_path}/b.png, {tmp_path}/c/d.png."


def test_empty_captions_are_a_warning(tmp_path):
    save_pair(tmp_path, "a.png", 1).with_suffix(".txt").write_text(" \n")
    save_pair(tmp_path, "b.png", 2)
    report = validate_folder(tmp_path)
    assert report.ok
    (warning,) = report.warnings
    assert warning == (
        f"1 caption is empty, to be trained without words: {tmp_path}/a.txt. Fill those that are not meant to be."
    )


def test_notes_of_the_decoder_are_warnings_with_the_path(tmp_path):
    save_pair(tmp_path, "a.jpg")
    Image.new("CMYK", (32, 32)).save(tmp_path / "a.jpg")
    (warning,) = validate_folder(tmp_path).warnings
    assert warning.startswith(f"{tmp_path}/a.jpg is CMYK without a colour profile")


def test_caption_extension_is_passed_on(tmp_path):
    save_pair(tmp_path, "a.png").with_suffix(".txt").rename(tmp_path / "a.caption")
    assert validate_folder(tmp_path, "caption").ok
    assert not validate_folder(tmp_path, "txt").ok


@pytest.mark.parametrize(("multiple", "ok"), [(None, True), (16, True), (32, False)])
def test_the_models_multiple_decides_what_is_too_small(tmp_path, multiple, ok):
    save_pair(tmp_path, "a.png", size=(40, 20))
    report = validate_folder(tmp_path, multiple=multiple)
    assert report.ok == ok
    if not ok:
        assert f"{tmp_path}/a.png is 40x20 pixels; each side must have at least 32." in report.faults[0]


def test_an_impossible_img_size_is_a_fault(tmp_path):
    save_pair(tmp_path, "a.png")
    assert validate_folder(tmp_path, img_size=8).faults == ("img_size is 8; it must be at least 16.",)


def make_edit_set(folder: Path) -> None:
    for seed, name in enumerate(("a.jpg", "b.png")):
        save_pair(folder / "images", name, seed)
        save_pair(folder / "control", name, seed + 10).with_suffix(".txt").unlink()


def test_the_edit_layout_is_known(tmp_path):
    make_edit_set(tmp_path)
    report = validate_folder(tmp_path)
    assert report.ok and report.num_pictures == 2
    assert (report.image_folder, report.control_folders) == (tmp_path / "images", (tmp_path / "control",))
    assert f"Control pictures: {tmp_path}/control" in report.render()
    assert validate_folder(tmp_path, img_size=32).bucket_counts == {(32, 32): 2}, "control pictures do not count"


def test_faults_of_the_edit_layout_are_found(tmp_path):
    make_edit_set(tmp_path)
    (tmp_path / "control/a.jpg").unlink()
    (tmp_path / "control/b.png").write_bytes(b"")
    faults = validate_folder(tmp_path).faults
    assert len(faults) == 2
    assert f"images/a.jpg has no control picture {tmp_path}/control/a.*." in faults[0]
    assert f"{tmp_path}/control/b.png is empty" in faults[1]


def test_a_control_folder_elsewhere(tmp_path):
    make_edit_set(tmp_path)
    (tmp_path / "control").rename(tmp_path / "sketches")
    assert validate_folder(tmp_path / "images", control_folders=[tmp_path / "sketches"]).ok
    assert not validate_folder(tmp_path / "images", control_folders=[tmp_path / "control"]).ok


def test_a_control_that_is_its_target_is_a_warning_and_no_duplicate(tmp_path):
    save_pair(tmp_path / "images", "a.png", 1)
    save_pair(tmp_path / "images", "b.png", 2)
    save_pair(tmp_path / "control", "a.png", 1).with_suffix(".txt").unlink()
    save_pair(tmp_path / "control", "b.png", 3).with_suffix(".txt").unlink()
    report = validate_folder(tmp_path)
    assert report.ok
    (warning,) = report.warnings
    assert warning.startswith("1 control picture is the target itself: a.png.")


def save_edits(
    folder: Path, controls: Sequence[Image.Image], targets: Sequence[Image.Image], control_type: str = "jpg"
) -> None:
    for number, (control, target) in enumerate(zip(controls, targets, strict=True)):
        save_pair(folder / "images", f"{number}.png")
        (folder / "control").mkdir(exist_ok=True)
        target.save(folder / "images" / f"{number}.png")
        control.save(folder / "control" / f"{number}.{control_type}", quality=75)


def drawings(count: int) -> list[Image.Image]:
    """As in the demo: hard lines, which JPEG blurs most."""
    paths = sorted((Path(__file__).parents[3] / "assets/demo-edit/train/images").glob("*.png"))[:count]
    return [Image.open(path).convert("RGB") for path in paths]


def test_controls_that_are_their_targets_saved_again_are_a_warning(tmp_path):
    save_edits(tmp_path, drawings(7), drawings(7))
    (warning,) = validate_folder(tmp_path).warnings
    assert "7 control pictures are nearly the target, of 7: 0.png, 1.png" in warning and "and 2 more" in warning
    assert "change nothing" in warning


def test_a_small_edit_is_none(tmp_path):
    """25 by 25 of 256 by 256 pixels in another colour: less on average than saving as JPEG changes."""
    edited = drawings(5)
    for picture in edited:
        picture.paste((90, 160, 60), (100, 100, 125, 125))
    save_edits(tmp_path, drawings(5), edited)
    assert validate_folder(tmp_path).warnings == ()


def test_rows_that_change_nothing_may_be_up_to_half(tmp_path):
    plain = drawings(6)
    inverted = [ImageOps.invert(picture) for picture in plain]
    save_edits(tmp_path / "half", plain, plain[:3] + inverted[3:])
    assert validate_folder(tmp_path / "half").warnings == ()
    save_edits(tmp_path / "most", plain, plain[:4] + inverted[4:])
    (warning,) = validate_folder(tmp_path / "most").warnings
    assert "4 control pictures are nearly the target, of 6: 0.png, 1.png, 2.png, 3.png." in warning


def test_a_smaller_control_is_compared_and_one_of_another_shape_is_a_reference(tmp_path):
    plain = drawings(3)
    save_edits(tmp_path / "small", [picture.resize((128, 128)) for picture in plain], plain, "png")
    assert "3 control pictures are nearly" in validate_folder(tmp_path / "small").warnings[0]
    wide = [Image.new("RGB", (64, 32), (250, 250, 250))] * 3
    save_edits(tmp_path / "shape", wide, [Image.new("RGB", (64, 64), (250, 250, n)) for n in (247, 248, 249)])
    assert validate_folder(tmp_path / "shape").warnings == ()


def test_the_demos_own_pairs_are_far_apart():
    assert validate_folder(Path(__file__).parents[3] / "assets/demo-edit/train").warnings == ()


def test_the_contracts_function_prints_and_answers(tmp_path, capsys):
    assert script.validate_dataset is validate_dataset
    save_pair(tmp_path, "a.png")
    assert script.validate_dataset(str(tmp_path)) is True
    assert "The data set is fine." in capsys.readouterr().out
    (tmp_path / "a.txt").unlink()
    assert script.validate_dataset(tmp_path) is False
    assert f"{tmp_path}/a.png has no caption" in capsys.readouterr().out


def test_the_contracts_command(tmp_path, repo_root):
    def run(folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "utils/validate_dataset.py", "--path", str(folder), "--img_size", "64"]
        return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)

    save_pair(tmp_path / "good", "a.png", size=(64, 64))
    good, missing = run(tmp_path / "good"), run(tmp_path / "absent")
    assert (good.returncode, missing.returncode) == (0, 1), good.stderr + missing.stderr
    assert "64 x 64: 1" in good.stdout
    assert f"{tmp_path}/absent does not exist" in missing.stdout and missing.stderr == ""


# ---- captions that are cut


def long_captions(folder: Path) -> None:
    for seed, caption in enumerate(("a cat", "word " * 600, "word " * 512)):
        save_pair(folder, f"{'abc'[seed]}.png", seed, caption)


def test_without_a_model_captions_of_very_many_words_are_a_note(tmp_path):
    long_captions(tmp_path)
    report = validate_folder(tmp_path)
    text = " ".join(report.render().split())
    assert "cut by models that read 512 tokens. [caption-long]" in text and f"{tmp_path}/b.txt (600 words)" in text
    assert "--model MODEL" in text and report.warnings == ()
    (tmp_path / "b.txt").write_text("a dog")
    assert "caption-long" not in validate_folder(tmp_path).render(), "the folder's name may hold any number"


def test_a_model_names_captions_that_it_cuts(tmp_path):
    long_captions(tmp_path)

    def warnings(model: str, **settings: int) -> tuple[str, ...]:
        folder = ModelFolder(ROOT / "assets" / model)
        report = validate_folder(tmp_path, counter=CaptionCounter(family_of(folder), folder, **settings))
        assert report.ok and "caption-long" not in report.render()
        return tuple(warning for warning in report.warnings if "longer than" in warning)

    (qwen,) = warnings("tiny-qwen-image")
    assert qwen.startswith("2 captions are longer than the 512 tokens") and f"{tmp_path}/b.txt (" in qwen
    clip, t5 = warnings("tiny-flux", max_tokens=1000)
    assert "77 tokens that CLIP reads" in clip and "1000 tokens that T5 reads" in t5
    assert warnings("tiny-qwen-image-edit") == ()
    (edit,) = warnings("tiny-qwen-image-edit", max_tokens=1)
    assert edit.startswith("3 captions")


def test_control_pictures_count_at_the_size_that_the_text_encoder_sees(tmp_path):
    make_edit_set(tmp_path)
    path = shutil.copytree(ROOT / "assets" / "tiny-qwen-image-edit", tmp_path.parent / f"{tmp_path.name}-model")
    processor = path / "processor" / "preprocessor_config.json"
    # The small model's sees at most 16 tokens of a picture; those of the published models this much.
    size = {"longest_edge": 12845056, "shortest_edge": 3136}
    processor.write_text(json.dumps({**json.loads(processor.read_text()), "size": size}))
    folder = ModelFolder(path)

    def tokens(control_size: int) -> list[int]:
        counter = CaptionCounter(family_of(folder), folder, 1, control_size)
        (warning,) = [w for w in validate_folder(tmp_path, counter=counter).warnings if "longer than" in w]
        return [int(number) for number in re.findall(r"\((\d+) tokens\)", warning)]

    more = [large - small for small, large in zip(tokens(256), tokens(512), strict=True)]
    assert more == [round(512 / 28) ** 2 - round(256 / 28) ** 2] * 2, "a token a square of 28 pixels"


def test_the_command_takes_a_model(tmp_path):
    long_captions(tmp_path)
    model = ROOT / "assets" / "tiny-qwen-image"
    result = pixtune("validate", "--path", tmp_path, "--model", model, "--max-text-tokens", 1)
    assert result.returncode == 0 and "3 captions are longer than the 1 token" in result.stdout
    lone = pixtune("validate", "--path", tmp_path, "--max-text-tokens", 1)
    assert lone.returncode == 2 and "works with --model only" in " ".join(lone.stdout.replace("│", " ").split())


def test_pixels_are_not_kept(tmp_path):
    """The report of a large folder is small: it holds no picture."""
    save_pair(tmp_path, "a.png", size=(256, 256))
    report = validate_folder(tmp_path)
    assert not any(isinstance(value, Image.Image | np.ndarray) for value in vars(report).values())
