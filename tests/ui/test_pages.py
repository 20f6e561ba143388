"""The routes of the page, asked without a browser: what they answer, and what they write."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.runs import DEMO_TRAIN, TINY_MODEL
from tests.ui.conftest import PLACE, RUN

pytest.importorskip("starlette", reason="the page's packages are not installed: pip install 'pixtune[ui]'")

from PIL import Image

from pixtune.config import load_config
from pixtune.config.folders import folders_of
from pixtune.data.layouts import find_examples
from pixtune.data.masks import find_masks
from pixtune.errors import PixtuneError, WriteError
from pixtune.queue.starting import _take_next
from pixtune.queue.store import Queue, usual_folder
from pixtune.storage.output_lock import OutputLock
from pixtune.ui.configs import given_values
from pixtune.ui.masks import LARGEST_MASK_BYTES, exchange
from pixtune.ui.queue_page import _serve
from pixtune.ui.server import ROUTES
from pixtune.ui.yaml_edit import set_key

JSON = {"accept": "application/json"}


def test_a_new_run_is_a_config_that_says_only_what_matters(page):
    answer = page.post("/new", {"name": "cat", "model": str(TINY_MODEL), "pictures": "here/datasets/first"})
    assert answer.json() == {"place": "here/configs/cat.yaml"}
    values = yaml.safe_load((page.home / "configs" / "cat.yaml").read_text())
    assert values["data_config"]["img_dir"] == "datasets/first" and values["output_dir"] == "runs/cat"
    assert "alien, twemoji style" in values["samples"]["prompts"]
    again = page.post("/new", {"name": "cat", "model": "x"})
    assert again.status_code == 400 and "already" in again.json()["error"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".x", "a" * 65, "a\0", "-x"])
def test_names_that_could_be_paths_are_refused(page, name):
    assert page.post("/new", {"name": name, "model": "x"}).status_code == 400


def test_a_new_run_that_cannot_be_is_explained_beside_what_was_filled_in(page, tmp_path):
    fields = {"name": "Süße Katze 2", "model": "my/model", "source": "folder"}

    def ask(pictures: str):
        return page.client.post("/new", data={**fields, "pictures": pictures}, follow_redirects=False)

    for pictures, words in (("", "no folder was chosen"), ("nowhere", "no folder"), (str(tmp_path), "--root")):
        answer = ask(pictures)
        assert answer.status_code in (400, 404) and words in answer.text
        assert 'value="Süße Katze 2"' in answer.text and 'value="my/model"' in answer.text
        assert not (page.home / "configs" / "Süße-Katze-2.yaml").exists()
    assert ask(str(page.pictures)).headers["location"] == "/pictures/here/configs/S%C3%BC%C3%9Fe-Katze-2.yaml"
    again = ask("datasets/first")
    assert "already" in again.text and 'href="/pictures/here/configs/S%C3%BC%C3%9Fe-Katze-2.yaml"' in again.text


def test_what_a_check_found_is_called_old_once_a_caption_is_changed(page):
    from pixtune.ui.checks import _files, state_of
    from pixtune.ui.configs import open_config

    file = open_config(page.work, PLACE)
    report, _ = _files(page.work, file)
    report.parent.mkdir()
    case = {"text": "datasets/first/alien.png (20%)", "files": ["datasets/first/alien.png"]}
    finding = {"level": "warning", "code": "cropped", "meaning": "cut", "remedy": "", "cases": [case]}
    report.write_text(json.dumps({"verdict": "problems", "data_sets": [{"findings": [finding]}]}))
    assert not state_of(page.work, file).is_old and "cannot start yet" in page.client.get(f"/check/{PLACE}").text
    tile = page.get(f"/pictures/{PLACE}").json()["shelves"][0]["tiles"][0]
    assert [mark["text"] for mark in tile["marks"]] == ["cropped: (20%)"]
    os.utime(report, (os.stat(report).st_mtime - 1,) * 2)
    for path in (page.config, page.pictures):
        os.utime(path, (0, 0))
    page.post(f"/caption/{PLACE}", {"file": "alien.txt", "text": "one"})
    assert state_of(page.work, file).is_old and "cannot start yet" not in page.client.get(f"/check/{PLACE}").text


def test_while_a_check_is_at_work_it_has_no_findings(page):
    from pixtune.ui.checks import _files, state_of
    from pixtune.ui.configs import open_config
    from pixtune.ui.jobs import Job

    file = open_config(page.work, PLACE)
    report, console = _files(page.work, file)
    report.parent.mkdir()
    report.write_text('{"verdict": "fine", "data_sets": []}')  # of an earlier check
    running: Any = SimpleNamespace(poll=lambda: None)
    page.work.jobs._jobs["check", file.path] = Job((), running, console)
    state = state_of(page.work, file)
    assert state.is_running and not state.verdict and not state.findings and not state.trouble
    assert "Looking at every picture" in page.client.get(f"/check/{PLACE}").text
    assert page.get(f"/pictures/{PLACE}").status_code == 200, "its marks are those of no finding"
    running.poll = lambda: 0
    assert not state_of(page.work, file).is_running and state_of(page.work, file).verdict == "fine"
    report.unlink()
    console.write_text("Killed\n")
    assert state_of(page.work, file).trouble == "Killed\n", "it has left no report"


def test_a_plan_without_all_captions_cannot_be_started(page):
    page.config.write_text(page.config.read_text().replace(": model", f": {TINY_MODEL}"))
    button = '<button class="primary" disabled>Start the run'
    assert button not in page.client.get(f"/plan/{PLACE}").text
    (page.pictures / "alien.txt").unlink()
    text = page.client.get(f"/plan/{PLACE}").text
    assert button in text and "1 picture has no caption" in text and "--as" not in text


def test_captions_are_offered_as_prompts_to_a_run_whose_pictures_came_after_its_config(page):
    prompts = page.get(f"/plan/{PLACE}").json()["prompts"]
    assert len(prompts) == 3 and "alien, twemoji style" in prompts
    page.post(f"/plan/{PLACE}", {"key": "samples.prompts", "value": "\n".join(prompts)})
    assert list(load_config(page.config, folders_must_exist=False).samples.prompts) == prompts
    assert page.get(f"/plan/{PLACE}").json()["prompts"] == []


def test_pictures_stand_beside_their_captions(page):
    (page.pictures / "alien.txt").unlink()
    shelf = page.get(f"/pictures/{PLACE}").json()["shelves"][0]
    captions = {tile["name"]: tile["caption"] for tile in shelf["tiles"]}
    assert captions["books.png"] == "books, twemoji style" and captions["alien.png"] == ""
    marks = {tile["name"]: [mark["code"] for mark in tile["marks"]] for tile in shelf["tiles"]}
    assert marks["alien.png"] == ["missing"] and marks["books.png"] == []


def test_a_caption_is_saved_and_undone(page):
    file = page.pictures / "alien.txt"
    before = file.read_text()
    fields = {"file": "alien.txt", "before": before, "text": "  one alien\r\n"}
    assert page.post(f"/caption/{PLACE}", fields).json()["text"] == "one alien"
    assert file.read_text() == "one alien"
    assert page.post(f"/undo/{PLACE}", {}).json()["texts"] == {"alien.txt": before.strip()}
    assert file.read_text() == before.strip()
    assert page.post(f"/undo/{PLACE}", {}).status_code == 400


def test_a_caption_that_another_one_changed_is_kept(page):
    (page.pictures / "alien.txt").write_text("by hand")
    answer = page.post(f"/caption/{PLACE}", {"file": "alien.txt", "before": "as shown", "text": "mine"})
    assert answer.status_code == 409 and "by hand" in answer.json()["error"]
    assert (page.pictures / "alien.txt").read_text() == "by hand"


def test_undo_takes_a_new_caption_file_away_again(page):
    (page.pictures / "alien.txt").unlink()
    page.post(f"/caption/{PLACE}", {"file": "alien.txt", "before": "", "text": "new"})
    page.post(f"/undo/{PLACE}", {})
    assert not (page.pictures / "alien.txt").exists()


def test_replacing_is_previewed_done_and_undone_as_one(page):
    fields = {"find": "twemoji", "replace": "flat"}
    texts = [path.read_text() for path in sorted(page.pictures.glob("*.txt"))]
    assert page.post(f"/replace/{PLACE}", {**fields, "preview": "yes"}).json()["num_changed"] == 4
    assert [path.read_text() for path in sorted(page.pictures.glob("*.txt"))] == texts
    page.post(f"/replace/{PLACE}", fields)
    assert (page.pictures / "alien.txt").read_text() == "alien, flat style"
    page.post(f"/undo/{PLACE}", {})
    assert [path.read_text() for path in sorted(page.pictures.glob("*.txt"))] == [text.strip() for text in texts]


def test_a_trigger_word_comes_once_before_each_caption(page):
    (page.pictures / "alien.txt").write_text("a ZWX alien")
    assert page.post(f"/replace/{PLACE}", {"trigger": " zwx "}).json()["num_changed"] == 3
    assert (page.pictures / "books.txt").read_text() == "zwx, books, twemoji style"
    assert page.post(f"/replace/{PLACE}", {"trigger": "zwx"}).json()["num_changed"] == 0


def test_a_damaged_journal_loses_only_its_own_lines(page):
    page.post(f"/caption/{PLACE}", {"file": "alien.txt", "text": "one"})
    with (page.pictures / ".pixtune_edits.jsonl").open("a") as journal:
        journal.write('{"number": 9, "edits": [["../../configs/first.yaml", "", "bad"]]\nnonsense\n[]\n')
    page.post(f"/caption/{PLACE}", {"file": "alien.txt", "text": "two"})
    page.post(f"/undo/{PLACE}", {})
    assert (page.pictures / "alien.txt").read_text() == "one"


def test_a_journal_of_a_stranger_writes_nothing_elsewhere(page):
    line = {"number": 1, "words": "x", "edits": [["../../configs/first.yaml", None, None]], "undoes": None}
    (page.pictures / ".pixtune_edits.jsonl").write_text(json.dumps(line) + "\n")
    assert page.post(f"/undo/{PLACE}", {}).status_code == 400
    assert page.config.exists()


def test_dropped_pictures_arrive(page):
    content = (DEMO_TRAIN / "carrot.png").read_bytes()
    assert page.client.put(f"/upload/{PLACE}?name=carrot.png", content=content).status_code == 201
    assert (page.pictures / "carrot.png").read_bytes() == content
    assert page.client.put(f"/upload/{PLACE}?name=carrot.txt", content="Möhre".encode()).status_code == 201
    assert (page.pictures / "carrot.txt").read_text() == "Möhre"


def test_the_plan_shows_memory_by_phase_and_what_more_costs(page):
    page.config.write_text(page.config.read_text().replace("first_model", "x").replace(": model", f": {TINY_MODEL}"))
    view = page.get(f"/plan/{PLACE}?card=RTX 4090").json()
    plan = view["plan"]
    assert plan["fits"] and [bar["name"] for bar in plan["bars"]][-1] == "training step"
    assert all(0 < bar["gib"] < plan["usable_gib"] for bar in plan["bars"])
    assert {other["words"] for other in plan["others"]} >= {"twice the rank", "pictures of 96 pixels"}
    assert view["model"]["is_here"]


@pytest.mark.parametrize(("size", "larger"), [(64, 96), (1008, 1504), ([64, 512], 768)])
def test_what_more_costs_is_planned_with_the_values_that_it_names(page, monkeypatch, size, larger):
    """Half as large again, rounded down to pixels that models take; of several sizes, from the largest one."""
    from pixtune.ui import plan_page

    config = load_config(page.config, [f"data_config.img_size={size}", "rank=8", "train_batch_size=3"])
    planned = []

    def note(changed, card):
        planned.append((changed.data_config.img_size, changed.batch_size, changed.rank))
        raise PixtuneError("noted")

    monkeypatch.setattr(plan_page, "make_report", note)
    words = [other.words for other in plan_page.other_choices(config, "")]
    size = config.data_config.img_size
    assert planned == [(larger, 3, 8), (size, 6, 8), (size, 3, 16)]
    assert words == [f"pictures of {larger} pixels", "twice as many pictures at once", "twice the rank"]


def test_a_model_that_is_not_here_is_planned_and_its_download_named(page):
    page.config.write_text(page.config.read_text().replace(": model", ": Qwen/Qwen-Image"))
    view = page.get(f"/plan/{PLACE}?card=RTX 4090").json()
    assert view["plan"]["has_gpu"] and not view["model"]["is_here"]
    assert "55 GB" in view["model"]["words"] and view["model"]["command"].startswith("hf download")


def test_changing_a_key_leaves_the_rest_of_the_yaml_as_it_is(page):
    page.post(f"/plan/{PLACE}", {"key": "data_config.img_size", "value": "512"})
    page.post(f"/plan/{PLACE}", {"key": "samples.prompts", "value": "a cat\n\na dog"})
    page.post(f"/plan/{PLACE}", {"key": "rank", "value": "8"})
    page.post(f"/plan/{PLACE}", {"key": "rank", "value": ""})
    text = page.config.read_text()
    assert text.startswith("# my own words") and "max_train_steps: 4 # few" in text and "rank" not in text
    given = given_values(text)
    assert given["data_config.img_size"] == 512 and given["samples.prompts"] == ["a cat", "a dog"]
    assert page.post(f"/plan/{PLACE}", {"key": "rnak", "value": "8"}).status_code == 400


def test_wrong_yaml_is_kept_and_explained(page):
    page.post(f"/plan/{PLACE}", {"yaml": "rank: [\n"})
    assert page.config.read_text() == "rank: [\n"
    plan = page.get(f"/plan/{PLACE}").json()["plan"]
    assert "problem" in plan["problem"] and plan["faults"]
    assert page.client.get(f"/plan/{PLACE}").status_code == 200
    assert page.post(f"/start/{PLACE}", {}).status_code == 400


def test_keys_are_set_as_a_dictionary_would_set_them():
    """Random changes of texts, flow style and comments among them, against a plain dictionary."""
    import random

    texts = ["", "rank: 3", "a: {b: 1, c: [2]}\n", "samples: {prompts: [a], every: 3}\nrank: 4 # c\n", "samples:\n"]
    texts += ["samples:\n  prompts:\n  - a\n  - b\n# end\n", "ema:\n  decay: |\n    foo\n\n    bar\nrank: 2 # x\n"]
    keys: dict[str, list[object]] = {
        "rank": [8],
        "samples.prompts": [["a: b", "# c"], ["x\ny"]],
        "samples.every": [10],
        "ema.decay": [0.9],
    }
    rng = random.Random(1)
    for text in texts * 6:
        expected = {key: value for key, value in given_values(text).items() if value is not None}
        for _ in range(8):
            key = rng.choice([*keys])
            value = rng.choice([None, *keys[key]])
            text = set_key(text, key, value)
            expected = (
                {**expected, key: value} if value is not None else {k: v for k, v in expected.items() if k != key}
            )
            assert {k: v for k, v in given_values(text).items() if v is not None} == expected, text


def test_a_run_is_started_by_the_command_that_is_shown(page):
    page.config.write_text(
        page.config.read_text().replace(": model", f": {TINY_MODEL}").replace("first\nmax", "new\nmax")
    )
    assert page.post(f"/start/{PLACE}", {}).json() == {"place": "here/runs/new"}
    assert page.started == [["run", "train", str(page.config)]]


@pytest.fixture
def busy(page):
    """The config of a run `new`, while another one, `other`, is at work."""
    text = page.config.read_text().replace(": model", f": {TINY_MODEL}").replace("runs/first", "runs/new")
    page.config.write_text(text)
    with OutputLock(page.home / "runs" / "other") as lock:
        lock.acquire()
        yield


def test_a_run_waits_in_the_queue_while_another_is_at_work(page, busy):
    assert "other</strong> is at work" in page.client.get(f"/plan/{PLACE}").text
    assert page.post(f"/start/{PLACE}", {}).json() == {"place": "here/runs/new", "is_queued": True}
    view = page.get("/queue").json()
    assert [each["name"] for each in view["waiting"]] == ["new"] and page.started == []
    assert [each["name"] for each in view["others"]] == ["other"]
    queue = Queue(usual_folder())
    assert _serve(page.work, queue.folder) == [] and queue.entries()[0].state == "waiting"
    again = page.post(f"/start/{PLACE}", {})
    assert again.status_code == 400 and "entry 1" in again.json()["error"]


def test_a_run_is_started_beside_another_where_a_person_wants_that(page, busy):
    assert page.post(f"/start/{PLACE}", {"beside": "yes"}).json() == {"place": "here/runs/new"}
    assert page.started == [["run", "train", str(page.config)]]


def test_a_run_that_the_queue_loads_is_starting_and_is_not_started_twice(page):
    text = page.config.read_text().replace(": model", f": {TINY_MODEL}").replace("runs/first", "runs/new")
    page.config.write_text(text)
    folder = page.home / "runs" / "new"
    folder.mkdir(parents=True)
    (folder / "console.txt").write_text("error: of an earlier start")
    assert page.get("/run/here/runs/new").json()["run"]["state"] == "failed"
    page.post("/queue", {"what": "add", "config": PLACE})
    taken = _take_next(Queue(usual_folder()))
    assert taken is not None
    lock = taken[1]
    try:
        assert page.get("/run/here/runs/new").json()["run"]["state"] == "starting"
        assert "starting" in [run["state"] for run in page.get("/").json()["runs"]]
        assert page.post(f"/start/{PLACE}", {}).json() == {"place": "here/runs/new"} and page.started == []
    finally:
        os.close(lock)


def test_a_run_shows_its_curves_samples_and_best_step(page):
    run = page.get(f"/run/{RUN}").json()["run"]
    assert (run["state"], run["step"], run["best_step"], run["best_loss"]) == ("stopped", 4, 2, 0.5)
    figures = page.get(f"/figures/{RUN}").json()
    assert figures["curves"]["loss"] == [[1, 1.0], [2, 0.5], [3, 1 / 3], [4, 0.25]]
    assert [each["loss"] for each in figures["validations"]] == [0.9, 0.5, 0.7]
    strips = page.get(f"/samples/{RUN}").json()["strips"]
    assert [sample["step"] for sample in strips[0]["samples"]] == [0, 2, 4]
    assert 'class="best"' in page.client.get(f"/samples/{RUN}").text


def test_a_run_that_is_over_can_be_asked_for_nothing(page):
    answer = page.post(f"/ask/{RUN}", {"what": "sample_now"})
    assert answer.status_code == 400 and "not running" in answer.json()["error"]
    assert page.post(f"/ask/{RUN}", {"what": "rm -rf"}).status_code == 400


def test_results_are_downloaded(page):
    assert page.get(f"/download/{RUN}?file=comfyui_lora.safetensors").content == b"a LoRA"
    assert page.get(f"/result/{RUN}").json()["downloads"][0]["file"] == "comfyui_lora.safetensors"


def test_results_that_are_not_there_are_refused(page):
    for url, words in (
        ("download/here/runs/first?file=metrics.json", "file is one of pytorch_lora_weights.safetensors, "),
        ("download/here/runs/first?file=report.html", "this run has no report.html"),
        ("download/here/runs/none?file=report.html", "there is no run"),
        ("card/here/runs/first", "the card is made of the run's config, which no file of it holds yet"),
        ("card/here/runs/none", "there is no run"),
    ):
        answer = page.get(f"/{url}")
        assert answer.status_code == 400 and words in answer.json()["error"], url


def test_a_report_is_shown_where_nothing_in_it_can_run_and_handed_on_as_a_file(page):
    (page.home / "runs" / "first" / "report.html").write_text("<p>a report</p>")
    url = f"/download/{RUN}?file=report.html"
    shown, handed_on = page.get(f"{url}&show=1"), page.get(url)
    assert shown.headers["content-type"].startswith("text/html")
    assert "sandbox" in shown.headers["content-security-policy"]
    assert handed_on.headers["content-type"] == "application/octet-stream"
    assert "first-report.html" in handed_on.headers["content-disposition"]
    assert shown.text == handed_on.text == "<p>a report</p>"


def test_a_check_is_started_as_the_command_that_a_person_types_and_the_last_one_s_report_is_gone(page):
    from pixtune.ui.checks import _files
    from pixtune.ui.configs import open_config

    report, _ = _files(page.work, open_config(page.work, PLACE))
    report.parent.mkdir()
    report.write_text('{"verdict": "fine", "data_sets": []}')
    assert page.post(f"/check/{PLACE}", {}).json() == {"is_running": True}
    assert page.started == [["check", "validate", str(page.config), "--json"]] and not report.exists()


def test_runs_are_listed_with_drafts(page):
    (page.home / "configs" / "draft.yaml").write_text(page.config.read_text().replace("runs/first", "runs/draft"))
    runs = {run["name"]: run["state"] for run in page.get("/").json()["runs"]}
    assert runs == {"first": "stopped", "draft": "draft"}


def test_folders_can_be_looked_through(page):
    entries = {entry["name"]: entry["num_pictures"] for entry in page.get("/folders/here/datasets").json()["entries"]}
    assert entries == {"first": 4}
    assert page.get("/folders/").json()["entries"][0]["place"] == "here"


def test_the_api_is_described_route_by_route(page):
    described = page.get("/openapi.json").json()
    operations = {(method.upper(), path) for path, methods in described["paths"].items() for method in methods}
    assert operations == {(method, path.replace(":path", "")) for method, path, _ in ROUTES}
    assert all(each["summary"] for methods in described["paths"].values() for each in methods.values())


@pytest.mark.parametrize("url", ["/", f"/pictures/{PLACE}", f"/plan/{PLACE}", f"/run/{RUN}", f"/result/{RUN}"])
def test_pages_load_nothing_from_elsewhere(page, url):
    text = page.client.get(url).text
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text
    assert " style=" not in text and "onclick" not in text and "<script>" not in text


def test_a_painted_mask_lies_where_training_finds_it(page):
    mask = io.BytesIO()
    Image.new("L", (64, 64), 255).save(mask, "PNG")
    url = f"/mask/{PLACE}?name=alien.png"
    assert page.get(url).json() == {"place": ""}
    assert page.client.put(url, content=mask.getvalue()).status_code == 201
    given = given_values(page.config.read_text())
    assert (given["data_config.mask_dir"], given["data_config.allow_missing_masks"]) == ("datasets/first-masks", True)
    found = find_masks(
        find_examples(folder := folders_of(load_config(page.config).data_config)[0]).pairs, folder, ()
    ).of_picture
    assert [*found] == ["alien.png"]
    assert page.get(url).json() == {"place": "here/datasets/first-masks/alien.png"}
    assert page.client.put(url, content=b"no picture").status_code == 400
    assert page.client.put(f"/mask/{PLACE}?name=../x.png", content=mask.getvalue()).status_code == 400


def test_masks_of_pictures_that_have_no_place_for_one_are_refused(page, tmp_path):
    mask = io.BytesIO()
    Image.new("L", (64, 64), 255).save(mask, "PNG")

    def put(content: bytes, name: str = "alien.png", folder: int = 0):
        return page.client.put(f"/mask/{PLACE}?name={name}&folder={folder}", content=content, headers=JSON)

    text = page.config.read_text()
    (page.pictures / "books.txt").unlink()
    assert "write its caption first" in (answer := put(mask.getvalue(), "books.png")).json()["error"]
    assert answer.status_code == 400
    assert "no such folder" in put(mask.getvalue(), folder=1).json()["error"]
    assert "more than" in put(bytes(LARGEST_MASK_BYTES + 1)).json()["error"]
    assert page.config.read_text() == text and not (page.home / "datasets" / "first-masks").exists()

    (elsewhere := tmp_path / "elsewhere").mkdir()
    page.config.write_text(text + f"  mask_dir: {elsewhere}\n  allow_missing_masks: true\n")
    answer = put(mask.getvalue())
    assert answer.status_code == 404 and "folder of masks lies outside" in answer.json()["error"]
    assert not [*elsewhere.iterdir()]

    folders = "  folders: [{img_dir: datasets/first}, {img_dir: datasets/second}]\n"
    shutil.copytree(page.pictures, page.home / "datasets" / "second")
    page.config.write_text(text.replace("  img_dir: datasets/first\n", folders))
    answer = put(mask.getvalue(), folder=1)
    assert answer.status_code == 400 and "has no folder of masks: give it a mask_dir" in answer.json()["error"]


@pytest.mark.parametrize("outside", ["control", "target"])
def test_only_pictures_that_the_page_may_write_change_places(page, tmp_path, outside):
    """Controls may lie elsewhere, and a link within the folders may lead there."""
    elsewhere, controls = tmp_path / "elsewhere", page.home / "controls"
    target = page.pictures / "alien.png"
    elsewhere.mkdir()
    controls.mkdir()
    control = (elsewhere if outside == "control" else controls) / "alien.png"
    shutil.copyfile(DEMO_TRAIN / "owl.png", control)
    if outside == "target":
        shutil.move(target, elsewhere / "mine.png")
        target.symlink_to(elsewhere / "mine.png")
    keys = f"  control_dir: {control.parent}\n  allow_missing_controls: true\n"
    page.config.write_text(page.config.read_text() + keys)
    before = target.read_bytes(), control.read_bytes()
    answer = page.post(f"/swap/{PLACE}", {"name": "alien.png"})
    assert answer.status_code == 404 and "the pictures lie outside" in answer.json()["error"]
    assert (target.read_bytes(), control.read_bytes()) == before


@pytest.mark.parametrize("call", range(4))
def test_pictures_that_cannot_change_places_stay_as_they_are(tmp_path, monkeypatch, call):
    """Each of the four steps fails once: linking both under names of their own, and putting both in their places."""
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    one.write_bytes(b"one")
    other.write_bytes(b"other")
    turns = iter(range(4))

    def failing(real):
        def act(*paths):
            if next(turns, None) == call:
                raise OSError(errno.EPERM, "not here")
            real(*paths)

        return act

    monkeypatch.setattr(os, "link", failing(os.link))
    monkeypatch.setattr(os, "replace", failing(os.replace))
    with pytest.raises(WriteError, match=r"one\.png and .*other\.png could not change places \(not here\)"):
        exchange(one, other)
    left = {path.read_bytes() for path in tmp_path.iterdir()}
    assert left == {b"one", b"other"}, "neither content is lost"
    assert call == 3 or (one.read_bytes(), other.read_bytes()) == (b"one", b"other")


def test_runs_are_compared_where_there_are_any(page):
    for places, words in (
        ((RUN,), "name two to four runs"),
        ((RUN, "here/configs"), "there is no run in here/configs"),
    ):
        answer = page.get("/compare?" + "&".join(f"run={place}" for place in places))
        assert answer.status_code == 400 and words in answer.json()["error"]
    shutil.copytree(page.home / "runs" / "first", page.home / "runs" / "second")
    compared = page.get(f"/compare?run={RUN}&run=here/runs/second").json()
    assert [each["name"] for each in compared["runs"]] == ["first", "second"]


def test_a_control_and_its_target_change_places_and_back(page):
    (page.home / "controls").mkdir()
    target, control = page.pictures / "alien.png", page.home / "controls" / "alien.png"
    shutil.copyfile(DEMO_TRAIN / "owl.png", control)
    before = target.read_bytes(), control.read_bytes()
    text = page.config.read_text().replace("img_size: 64", "img_size: 64\n  control_dir: controls")
    page.config.write_text(text + "  allow_missing_controls: true\n")
    for turn in (before[::-1], before):
        assert page.post(f"/swap/{PLACE}", {"name": "alien.png"}).status_code == 200
        assert (target.read_bytes(), control.read_bytes()) == turn
    assert page.post(f"/swap/{PLACE}", {"name": "books.png"}).status_code == 400
    assert not [path for path in (*page.pictures.iterdir(), *control.parent.iterdir()) if "swap" in path.name]


def test_a_model_card_names_no_path_and_no_caption(page):
    run = page.home / "runs" / "first"
    config = {"pretrained_model_name_or_path": str(TINY_MODEL), "rank": 8, "trigger_words": ["zwx"]}
    note = {"lock": None, "began": "x", "start_step": 0, "num_steps": 4, "step": 4, "outcome": "finished"}
    (run / "session.json").write_text(json.dumps({**note, "config": config}))
    card = page.get(f"/card/{RUN}").text
    assert "| rank | 8 |" in card and "`zwx`" in card and "0.7000" in card
    assert str(TINY_MODEL) not in card and str(page.home) not in card and "alien" not in card


def test_a_run_that_would_write_outside_the_folders_is_not_started(page, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    text = page.config.read_text().replace(": model", f": {TINY_MODEL}")
    page.config.write_text(text + f"  cache_dir: {tmp_path}/elsewhere\n")
    answer = page.post(f"/start/{PLACE}", {})
    assert answer.status_code == 404 and "outside" in answer.json()["error"]
    assert page.started == []


def test_runs_wait_in_the_queue_in_the_order_that_a_person_wants(page):
    for name in ("one", "two", "three"):
        text = page.config.read_text().replace(": model", f": {TINY_MODEL}").replace("runs/first", f"runs/{name}")
        (page.home / "configs" / f"{name}.yaml").write_text(text)
        at = "+2h" if name == "two" else ""
        fields = {"what": "add", "config": f"here/configs/{name}.yaml", "start_at": at}
        assert page.post("/queue", fields).status_code == 200

    def waiting() -> list[str]:
        return [each["name"] for each in page.get("/queue").json()["waiting"]]

    numbers = {each["name"]: str(each["id"]) for each in page.get("/queue").json()["waiting"]}
    assert waiting() == ["one", "two", "three"]
    page.post("/queue", {"what": "move", "id": numbers["three"], "place": "1"})
    page.post("/queue", {"what": "remove", "id": numbers["one"]})
    page.post("/queue", {"what": "pause", "id": numbers["three"]})
    assert waiting() == ["three", "two"]
    view = page.get("/queue").json()
    assert view["waiting"][0]["state"] == "held" and view["waiting"][1]["start_at"]
    page.post("/queue", {"what": "pause_all"})
    assert page.get("/queue").json()["is_paused"]
    assert "three" in page.client.get("/queue").text
    for fields in ({"what": "x"}, {"what": "remove", "id": "99"}, {"what": "add", "config": "here/../x.yaml"}):
        assert page.post("/queue", fields).status_code in (400, 404)


def test_the_server_imports_no_torch():
    """It would hold 200 MB beside the run's own."""
    code = "import sys, pixtune.ui.server; print([name for name in ('torch', 'accelerate') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert shown.stdout == "[]\n"
