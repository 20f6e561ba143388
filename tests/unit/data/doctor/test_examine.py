"""The doctor on whole folders: blur, odd pictures, pairs that do not lie on each other; what its command returns."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from pixtune.data.doctor.examine import find_misaligned
from pixtune.data.doctor.looks import take_look
from pixtune.data.doctor.pair_looks import PairLook
from pixtune.data.findings import Finding, Level
from pixtune.data.report_page import verdict
from pixtune.data.validate import Examination, validate_folder
from pixtune.judging.alignment import Alignment
from tests.pictures import save_pair
from tests.runs import ROOT, pixtune

ASSETS = ROOT / "assets"


def examine(folder: Path, img_size: int | None = None) -> dict[str, Finding]:
    report = validate_folder(folder, img_size=img_size, doctor=Examination())
    return {finding.code: finding for finding in report.findings}


def copy(folder: str, to: Path, number: int = 8) -> list[Path]:
    """Copies some pictures with their captions, numbered so that captions differ."""
    to.mkdir(parents=True, exist_ok=True)
    paths = sorted((ASSETS / folder).glob("*.png"))[:: 48 // number][:number]
    for path in paths:
        shutil.copy(path, to)
        (to / path.name).with_suffix(".txt").write_text(f"drawing of {path.stem}")
    return [to / path.name for path in paths]


def texts(finding: Finding) -> list[str]:
    return [case.text.split(" (")[0] for case in finding.cases]


@pytest.mark.parametrize("radius", [1, 3])
def test_blurred_pictures_are_named_beside_sharp_ones(tmp_path, radius):
    paths = copy("demo-style/train", tmp_path)
    Image.open(paths[2]).convert("RGB").filter(ImageFilter.GaussianBlur(radius)).save(paths[2])
    small = Image.open(paths[5]).convert("RGB").resize((100, 100), Image.Resampling.BICUBIC)
    small.resize((256, 256), Image.Resampling.BICUBIC).save(paths[5])
    assert set(texts(examine(tmp_path)["blurred"])) == {paths[2].name, paths[5].name}


def test_sharpness_does_not_depend_on_what_is_shown_or_on_a_blurred_ground():
    picture = Image.open(ASSETS / "known-edit/control/jumping-in-a-forest.png").convert("RGB")
    sharp = take_look(picture).sharpness
    portrait = picture.filter(ImageFilter.GaussianBlur(3))
    portrait.paste(picture.crop((80, 60, 180, 200)), (80, 60))
    dark = Image.fromarray((np.asarray(picture) * 0.5).astype(np.uint8))
    assert sharp is not None and sharp > 0.7
    assert take_look(portrait).sharpness == pytest.approx(sharp, rel=0.2)
    assert take_look(dark).sharpness == pytest.approx(sharp, rel=0.2)
    assert take_look(Image.new("RGB", (100, 100), "white")).sharpness is None


def test_plain_small_and_long_pictures_are_named(tmp_path):
    copy("demo-style/train", tmp_path)
    save_pair(tmp_path, "plain.png", caption="a wall", size=(256, 256))
    Image.new("RGB", (256, 256), (3, 3, 4)).save(tmp_path / "plain.png")
    save_pair(tmp_path, "small.png", 1, "a stamp", size=(60, 60))
    save_pair(tmp_path, "long.png", 2, "a street", size=(900, 200))
    found = examine(tmp_path)
    assert texts(found["plain"]) == ["plain.png"]
    assert texts(found["small-beside-others"]) == ["small.png"] and texts(found["extreme-shape"]) == ["long.png"]
    assert not {"small-beside-others", "extreme-shape"} & set(examine(tmp_path, img_size=256)), "their buckets say more"


def edit_set(folder: Path) -> Path:
    for part in ("images", "control"):
        (folder / part).mkdir(parents=True)
        for path in sorted((ASSETS / "known-edit" / part).iterdir()):
            shutil.copy(path, folder / part)
    return folder


def test_a_control_that_is_shifted_by_three_pixels_is_named_and_no_other(tmp_path):
    edit_set(tmp_path)
    path = tmp_path / "control/sitting-on-a-beach.png"
    levels = np.asarray(Image.open(path).convert("RGB"))
    moved = levels.copy()
    moved[:, 3:] = levels[:, :-3]
    Image.fromarray(moved).save(path)
    finding = examine(tmp_path)["pair-misaligned"]
    assert [case.text for case in finding.cases] == ["sitting-on-a-beach.png (3.0 px right)"]
    assert finding.cases[0].figures["shift_right_pixels"] == pytest.approx(-3, abs=0.1)
    assert finding.level == Level.WARNING


def test_other_faults_of_pairs_are_named(tmp_path):
    edit_set(tmp_path)
    control = tmp_path / "control"
    letterboxed = Image.open(control / "waving-at-night.png").convert("RGB").resize((256, 216))
    ImageOps.expand(letterboxed, (0, 20), "white").save(control / "waving-at-night.png")
    Image.open(ASSETS / "demo-style/train/owl.png").save(control / "running-in-the-snow.png")
    found = examine(tmp_path)
    assert [case.text for case in found["pair-border"].cases] == ["waving-at-night.png (control 8% top, 8% bottom)"]
    assert texts(found["pair-unlike"]) == ["running-in-the-snow.png"]


def test_controls_that_were_all_cropped_alike_are_one_mistake(tmp_path):
    edit_set(tmp_path)
    for path in (tmp_path / "control").iterdir():
        picture = Image.open(path).convert("RGB")
        picture.resize((256, 256), Image.Resampling.BICUBIC, box=(6, 6, 250, 250)).save(path)
    finding = examine(tmp_path)["pair-misaligned"]
    assert len(finding.cases) == 24 and "in the same way (4.9% larger)" in finding.meaning


@pytest.mark.parametrize("folder", ["demo-style/train", "demo-character/images", "known-edit", "demo-edit/train"])
def test_the_shipped_sets_have_no_warning(folder):
    assert {each.level for each in examine(ASSETS / folder).values()} <= {Level.NOTE}


def test_the_planted_pairs_are_drawn_anew_so_nothing_is_said_of_their_places():
    found = examine(ASSETS / "planted-faults")
    assert len(found["pair-redrawn"].cases) == 24 and "pair-misaligned" not in found
    assert texts(found["near-duplicates"]) == ["alien-again.png = alien.png", "lion-again.png = lion.png"]


def test_a_control_that_many_share_is_compared_with_each(tmp_path):
    shutil.copytree(ASSETS / "known-edit/images", tmp_path / "images")
    for path in (tmp_path / "images").glob("*.png"):
        shutil.copy(ASSETS / "known-edit/control/standing-at-night.png", tmp_path / path.name)
    rows = [
        {"image": f"images/{path.name}", "caption": path.stem, "control": "standing-at-night.png"}
        for path in sorted((tmp_path / "images").glob("*.png"))
    ]
    config = tmp_path / "config.yaml"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config.write_text(
        f"pretrained_model_name_or_path: {ASSETS / 'tiny-qwen-image-edit'}\noutput_dir: {tmp_path / 'run'}\n"
        "max_train_steps: 1\n"
        f"data_config: {{img_dir: {tmp_path}, metadata_file: {tmp_path / 'rows.jsonl'}, img_size: 256}}\n"
    )
    result = pixtune("validate", config, "--json")
    (data_set,) = as_json(result.stdout)["data_sets"]
    assert data_set["num_pictures"] == 24 and data_set["sizes"] == [{"width": 256, "height": 256, "num_pictures": 24}]


def as_json(output: str) -> dict[str, Any]:
    """Reads the report, behind which nothing comes; stderr's lines stand before it here."""
    report: dict[str, Any] = json.loads(output[output.index("{\n") :])
    return report


def test_exit_codes_and_json(tmp_path):
    paths = copy("demo-style/train", tmp_path)
    fine = pixtune("validate", tmp_path, "--strict")
    assert fine.returncode == 0 and "\nThe data set is fine. 8 pictures" in fine.stdout
    Image.open(paths[0]).convert("RGB").save(tmp_path / "again.jpg", quality=80)
    (tmp_path / "again.txt").write_text("the same thing")
    assert pixtune("validate", tmp_path).returncode == 0
    strict = pixtune("validate", "--path", tmp_path, "--strict", "--json")
    report = as_json(strict.stdout)
    assert strict.returncode == 3 and report["format"] == 1 and report["verdict"] == "warnings"
    (finding,) = [each for each in report["data_sets"][0]["findings"] if each["level"] == "warning"]
    assert finding["code"] == "near-duplicates" and finding["meaning"] and finding["remedy"]
    (case,) = finding["cases"]
    assert set(case) == {"text", "files", "figures", "detail"} and case["detail"] == "their captions differ"
    assert set(case["files"]) == {str(paths[0]), str(tmp_path / "again.jpg")}
    paths[1].with_suffix(".txt").unlink()
    broken = pixtune("validate", tmp_path, "--strict", "--json")
    assert broken.returncode == 1 and as_json(broken.stdout)["verdict"] == "problems"


def test_a_command_line_that_names_nothing_or_too_much_is_refused(tmp_path):
    for words in ([], [tmp_path, tmp_path], [tmp_path, "--path", tmp_path]):
        assert pixtune("validate", *words).returncode == 2


def test_names_cannot_forge_a_line_in_a_narrow_terminal(tmp_path):
    name = "x " * 30 + "The data set is fine. Indeed"
    save_pair(tmp_path, f"{name}.png", caption="a").with_suffix(".txt").unlink()
    lines = validate_folder(tmp_path, doctor=Examination()).render(width=80).split("\n")
    assert max(map(len, lines)) <= 80 or any(str(tmp_path) in line for line in lines)
    assert [line for line in lines if line.startswith("The data set")] == lines[:1]


def test_what_takes_a_second_is_counted_and_names_beyond_a_few_are_asked_for(tmp_path):
    for number in range(7):
        save_pair(tmp_path, f"{number}.png", number, "a dog").with_suffix(".txt").unlink()
        save_pair(tmp_path, f"{number}.png", number, f"thing {number}").with_suffix(".txt").write_text("")
    report = validate_folder(tmp_path)
    assert "and 2 more" in report.render() and "--all" in report.render()
    assert "6.txt" not in report.render() and "6.txt" in report.render(all_names=True)


def test_a_large_pair_is_not_named_for_less_than_can_be_measured():
    beside = PairLook(Alignment((1.2, 0.0), 1.0, 0.9, (6000, 4000)), (6000, 4000), (0.0,) * 4, (0.0,) * 4)
    near = PairLook(Alignment((1.2, 0.0), 1.0, 0.9, (800, 600)), (800, 600), (0.0,) * 4, (0.0,) * 4)
    names = {Path("far.png"): "far.png", Path("near.png"): "near.png"}
    found = next(find_misaligned({Path("far.png"): beside, Path("near.png"): near}, names))
    assert [case.text for case in found.cases] == ["near.png (1.2 px left)"]


def test_the_verdict_counts_in_plain_english() -> None:
    found = [Finding(level, "x", "x", (), "") for level in (Level.ERROR, Level.WARNING, Level.WARNING, Level.NOTE)]
    assert verdict(8, found) == ("The data set cannot be trained on: 1 problem, 2 warnings and 1 note, 8 pictures.")
    assert verdict(1, found[1:]) == "The data set can be trained on; look at 2 warnings and 1 note first. 1 picture."
    assert verdict(2, []) == "The data set is fine. 2 pictures."
