"""A workplace of the page with a few pictures, a config and a run that has ended, and a client that asks it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.runs import DEMO_TRAIN

if TYPE_CHECKING:  # the tests skip themselves where the page's packages are not installed
    from starlette.testclient import TestClient

    from pixtune.ui.jobs import Job, Jobs
    from pixtune.ui.workplace import Workplace

NAMES = ("alien", "avocado", "books", "camera")
CONFIG = """# my own words
pretrained_model_name_or_path: model
output_dir: runs/first
max_train_steps: 4 # few
data_config:
  img_dir: datasets/first
  img_size: 64
"""
PLACE, RUN = "here/configs/first.yaml", "here/runs/first"


@dataclass
class Page:
    """The page of a workplace, asked without a browser."""

    home: Path
    client: TestClient
    work: Workplace
    started: list[list[str]]
    """Words of the commands that were started; none of them runs."""

    @property
    def config(self) -> Path:
        return self.home / "configs" / "first.yaml"

    @property
    def pictures(self) -> Path:
        return self.home / "datasets" / "first"

    def get(self, url: str, **headers: str):
        return self.client.get(url, headers={"accept": "application/json", **headers})

    def post(self, url: str, fields: dict[str, str], **headers: str):
        return self.client.post(url, data=fields, headers={"accept": "application/json", **headers})


def build_home(home: Path) -> None:
    """Writes the files of a workplace: four captioned pictures, a config, a finished run with two rounds of samples."""
    pictures, run = home / "datasets" / "first", home / "runs" / "first"
    pictures.mkdir(parents=True)
    for name in NAMES:
        for ending in ("png", "txt"):
            shutil.copyfile(DEMO_TRAIN / f"{name}.{ending}", pictures / f"{name}.{ending}")
    (home / "configs").mkdir()
    (home / "configs" / "first.yaml").write_text(CONFIG)
    lines: list[dict[str, object]] = [
        {"kind": "step", "step": step, "loss": 1.0 / step, "grad_norm": 1.0, "learning_rate": 1e-4, "seconds": 0.5}
        for step in range(1, 5)
    ]
    for step, loss in ((0, 0.9), (2, 0.5), (4, 0.7)):
        lines.append({"kind": "validation", "step": step, "loss": loss, "quarters": [loss] * 4})
        path = f"samples/step-{step:06d}/000.png"
        (run / path).parent.mkdir(parents=True)
        shutil.copyfile(DEMO_TRAIN / "alien.png", run / path)
        lines.append({"kind": "sample", "step": step, "prompt": "<b>an alien</b>", "seed": 0, "path": path})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "comfyui_lora.safetensors").write_bytes(b"a LoRA")


@pytest.fixture
def page(tmp_path, monkeypatch) -> Iterator[Page]:
    """A workplace that only this machine reaches; processes are noted, and none is started."""
    from starlette.testclient import TestClient

    from pixtune.ui.jobs import Job, Jobs
    from pixtune.ui.security import Access
    from pixtune.ui.server import build_app

    home = tmp_path / "home"
    home.mkdir()
    build_home(home)
    started: list[list[str]] = []

    class Ended:
        returncode = 0

        def poll(self) -> int:
            return 0

    def start(
        self: Jobs, kind: str, path: Path, words: list[str], console: Path, *files: Path, **options: object
    ) -> Job:
        started.append([kind, *words])
        return Job(tuple(words), Ended(), console)  # type: ignore[arg-type]

    monkeypatch.setattr(Jobs, "start", start)
    monkeypatch.setattr("pixtune.ui.queue_page.advance", lambda queue: [])
    monkeypatch.setenv("PIXTUNE_QUEUE", str(tmp_path / "queue"))
    monkeypatch.chdir(home)
    app = build_app([home], Access(), tmp_path / "thumbnails")
    with TestClient(app, base_url="http://127.0.0.1:7860") as client:
        yield Page(home, client, app.state.workplace, started)
