"""A whole run with its modulation layers off the device: steps, validation, pictures, and going on after a stop."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pixtune.train
from pixtune import assembly
from pixtune.config import load_config
from pixtune.engine.load import LoadedTransformer
from pixtune.engine.modulation import ModulationTable
from pixtune.engine.modulation_ahead import SigmasAhead, StepsAhead
from pixtune.engine.modulation_filling import ModulationRows
from pixtune.tracking.metrics import read_metrics
from tests.runs import DEMO_TRAIN, overrides
from tests.shallow import shallow_model

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(params=["tiny-qwen-image", "tiny-flux"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, warm_cache: Path) -> Any:
    """Trains with a table of `num_rows` rows (0: without) and returns the LoRA and the metrics by step and kind."""
    decide_plan, pictures = assembly.decide_plan, tmp_path / "pictures"
    pictures.mkdir()
    for path in sorted(DEMO_TRAIN.iterdir())[:16]:
        shutil.copy(path, pictures)

    def train(
        name: str, num_rows: int, **changes: object
    ) -> tuple[dict[str, torch.Tensor], dict[tuple[str, int], float]]:
        monkeypatch.setattr(
            assembly, "decide_plan", lambda *args: replace(decide_plan(*args), modulation_rows=num_rows)
        )
        settings = {
            "pretrained_model_name_or_path": shallow_model(request.param), "max_train_steps": 6,
            "data_config.img_dir": pictures, "data_config.max_text_tokens": 16,
            "gradient_accumulation_steps": 2, "validation.held_out": 0.2, "validation.every": 3,
            "samples.prompts": "['red heart, twemoji style']", "samples.num_steps": 5, "samples.every": 9,
            "data_config.caption_dropout_rate": 0.3, "resume_from_checkpoint": "latest", "logging_steps": 1, **changes,
        }  # fmt: skip
        words = overrides(tmp_path / name, warm_cache, **{k.replace(".", "__"): v for k, v in settings.items()})
        pixtune.train.train(load_config(None, words))
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        losses = {(line["kind"], line["step"]): line["loss"] for line in lines if "loss" in line}
        return load_file(tmp_path / name / LORA), losses

    return train


def test_a_run_is_the_same_with_modulation_ahead(run: Any) -> None:
    """A step takes 4 samples and one row is for clean pictures, so 9 rows last for 2 steps; a picture takes 5 or 10."""
    plain, plain_losses = run("plain", 0)
    ahead, ahead_losses = run("ahead", 9)
    assert ahead_losses.keys() == plain_losses.keys() and ("validation", 3) in ahead_losses
    for place, loss in plain_losses.items():
        assert ahead_losses[place] == pytest.approx(loss, rel=1e-4), place
    for name, tensor in plain.items():
        torch.testing.assert_close(ahead[name], tensor, rtol=0.02, atol=2e-4)


def test_going_on_in_the_middle_of_a_stretch_is_exact(run: Any) -> None:
    whole, losses = run("whole", 20)  # stretches of 4 steps
    run("parts", 20, max_train_steps=3)
    parts, parts_losses = run("parts", 20)
    assert parts_losses == losses
    assert all(parts[name].equal(tensor) for name, tensor in whole.items())


class NotedTable:
    """Notes each call."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.used: list[list[float]] = []
        self.shown: list[list[int]] = []
        self.prepared: list[tuple[list[float], float]] = []

    def use(self, purpose: object, embed: Any) -> None:
        self.used.append(embed().tolist())

    def use_for_samples(self, purpose: object, embed: Any) -> None:
        self.used.append(embed().tolist())

    def show(self, places: list[int]) -> None:
        self.shown.append(places)

    def prepare(self, purpose: object, embed: Any, share: float) -> None:
        self.prepared.append((embed().tolist(), share))


class Sigmas:
    """A family whose time embedding is the sigma."""

    def embed_time(self, transformer: object, sigmas: torch.Tensor, text: object, guidance: float) -> torch.Tensor:
        return sigmas


@pytest.mark.parametrize("num_rows", [7, 8])
def test_stretches_begin_at_fixed_steps_and_the_next_one_is_filled_on_the_way(num_rows: int) -> None:
    """Three steps of two examples, whose rows and the one of clean pictures need seven; an eighth is no fourth step."""
    table: Any = NotedTable(num_rows)
    family: Any = Sigmas()
    ahead = StepsAhead(
        LoadedTransformer(torch.nn.Identity(), table=table), family,
        lambda step: (torch.tensor([step, step + 0.5]), {}), 2, 8, 1.0, torch.device("cpu"),
    )  # fmt: skip
    for step in (4, 5, 6):
        ahead.reach(step)
        ahead.look_ahead(step)
    second, third = [3.0, 3.5, 4.0, 4.5, 5.0, 5.5], [6.0, 6.5, 7.0, 7.5]
    assert table.used == [second, second, third]
    assert table.shown == [[2, 3, -1], [4, 5, -1], [0, 1, -1]]
    assert table.prepared == [(third, 2 / 3), (third, 1)], "and nothing after the last step"


@pytest.mark.parametrize(("num_rows", "per_step", "stretch"), [(5, 1, 4), (6, 1, 5), (5, 2, 2), (6, 2, 2)])
def test_a_samples_steps_are_made_ahead_as_far_as_there_are_rows(num_rows: int, per_step: int, stretch: int) -> None:
    """Examples with features of their own have a row each, others share a step's. One row is for clean pictures."""
    table: Any = NotedTable(num_rows)
    family: Any = Sigmas()
    family.time_features = ("pooled",) if per_step == 2 else ()
    sigmas = [0.9, 0.7, 0.5, 0.3, 0.1]
    conditioning = {"pooled": torch.zeros(2, 3), "prompt": torch.zeros(2, 9)}
    ahead = SigmasAhead(
        LoadedTransformer(torch.nn.Identity(), table=table), family, sigmas, conditioning, 1.0, torch.device("cpu")
    )
    for number in range(5):
        ahead.reach(number)
    groups = [sigmas[start : start + stretch] for start in range(0, 5, stretch)]
    assert table.used == [pytest.approx([sigma for sigma in group for _ in range(per_step)]) for group in groups]
    places = [[0], [1], [2], [3], [4]] if per_step == 1 else [[0, 1], [2, 3]]
    assert table.shown == [[*places[number % stretch], -1] for number in range(5)]


class Table:
    """A real table of six layers, with a model around it, whose weights are counted when they are read."""

    def __init__(self, num_rows: int = 8) -> None:
        generator = torch.Generator().manual_seed(0)
        self.embedder = torch.nn.Identity()
        self.layers = {f"blocks.{number}": ModulationRows(5, 4 + number) for number in range(6)}
        self.weights = {
            f"{path}.{part}": torch.randn(shape, generator=generator)
            for path, layer in self.layers.items()
            for part, shape in (("weight", (layer.out_features, 5)), ("bias", (layer.out_features,)))
        }
        self.num_read = 0
        self.table = ModulationTable(self.embedder, self.layers, self.read, num_rows)

    def read(self, name: str) -> torch.Tensor:
        self.num_read += name.endswith("weight")
        return self.weights[name]

    def rows(self, embedding_BD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rows that each layer hands out in a pass with these embeddings."""
        self.embedder(embedding_BD)
        return {path: layer(embedding_BD) for path, layer in self.layers.items()}

    def expect(self, embedding_BD: torch.Tensor) -> None:
        for path, found in self.rows(embedding_BD).items():
            activated = torch.nn.functional.silu(embedding_BD)
            wanted = torch.nn.functional.linear(activated, self.weights[f"{path}.weight"], self.weights[f"{path}.bias"])
            torch.testing.assert_close(found, wanted)


def giving(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def test_a_table_in_use_stays_what_it_is_while_the_next_one_is_filled() -> None:
    tried, generator = Table(), torch.Generator().manual_seed(1)
    stretches = torch.randn(3, 8, 5, generator=generator)
    reads = []
    for number, embeddings_ND in enumerate(stretches):
        tried.table.use(number, giving(embeddings_ND))
        reads.append(tried.num_read)
        for row in range(8):
            tried.table.show([row, -1])
            tried.expect(embeddings_ND[row : row + 1])
            tried.expect(embeddings_ND[[row, 7]])
            if number < 2:
                following = stretches[number + 1]
                tried.table.prepare(number + 1, giving(following), (row + 1) / 8)
        tried.table.check()
    assert reads == [6, 12, 18], "nothing was left to be read when a stretch began, but for the first one"


def test_pictures_between_steps_leave_the_table_of_the_steps_alone() -> None:
    tried, generator = Table(), torch.Generator().manual_seed(1)
    steps, following, asked = torch.randn(3, 8, 5, generator=generator)
    tried.table.use("steps", lambda: steps)
    tried.table.prepare("following", lambda: following, 0.5)
    tried.table.answer("pictures", lambda: asked)
    for row in (6, 1):
        tried.expect(asked[row : row + 1])
    before = tried.num_read
    tried.table.use("steps", lambda: steps)
    tried.table.show([3, -1])
    tried.expect(steps[3:4])
    assert tried.num_read == before, "nothing is recomputed for the steps"
    tried.table.use("following", lambda: following)
    tried.table.show([2, -1])
    tried.expect(following[2:3])
    tried.table.check()
    tried.rows(following[5:6])
    with pytest.raises(RuntimeError, match="was not among those announced"):
        tried.table.check()


@pytest.mark.parametrize("way", ["use", "use_for_samples", "answer"])
def test_an_embedding_that_was_not_prepared_is_noticed_before_the_next_table(way: str) -> None:
    """Rounding to bf16 is 0.4% at most; the next of 1,000 noise levels is farther away than 2%."""
    tried = Table()
    steps = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
    tried.table.use("steps", giving(steps))
    tried.table.show([3, -1])
    tried.rows(steps[3:4] * 1.01)
    tried.table.check()
    tried.rows(steps[[3, 7]] * torch.tensor([[1.0], [1.05]]))
    with pytest.raises(RuntimeError, match=r"4\.8% away from the nearest"):
        getattr(tried.table, way)("others", giving(2 * steps))


def test_weights_that_cannot_be_read_any_more_are_an_error() -> None:
    tried = Table()
    del tried.weights["blocks.3.bias"]
    with pytest.raises(KeyError, match=r"blocks\.3\.bias"):
        tried.table.use("steps", lambda: torch.ones(8, 5))
