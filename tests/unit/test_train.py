"""The loop and what happens around its steps, against what was worked out by hand: rates, losses, what is saved."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pixtune import assembly, services
from pixtune import train as training
from pixtune.config import load_config
from pixtune.config.schema import TrainConfig
from pixtune.data.batches import Batch
from pixtune.data.order import BatchOrder
from pixtune.data.prepare import prepare_data
from pixtune.data.swapped import Gains
from pixtune.errors import TrainingError
from pixtune.judging.validation import measure
from pixtune.launch.stop import StopRequest
from pixtune.plan.encoders import PLAINLY
from pixtune.progress import StepBar
from pixtune.services import measuring, swapped_controls
from pixtune.services.swapped_controls import SwappedControls
from pixtune.storage.checkpoint import load_checkpoint
from pixtune.storage.checkpoint_state import find_checkpoints
from pixtune.storage.course import Course
from pixtune.tracking.figures import StepFigures
from pixtune.tracking.memory import RunMemory
from pixtune.tracking.metrics import MetricsLog, read_metrics
from tests.runs import DEMO_TRAIN, overrides, write_config
from tests.shallow import shallow_model

SETTINGS: dict[str, object] = {
    "max_train_steps": 4,
    "lr_scheduler": "linear",
    "lr_warmup_steps": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 3,
    "checkpointing_steps": 2,
    "objective__guidance": 4.0,
    "validation__held_out": 0.2,
    "validation__num_draws": 1,
}
RATES = [0.0, 0.5e-3, 1e-3, 0.5e-3]
"""Two steps up to 1e-3, then two down to where a fifth would have none."""


def config_of(folder: Path, cache: Path, **changes: object) -> TrainConfig:
    """A run on six pictures."""
    pictures = folder / "pictures"
    if not pictures.exists():
        pictures.mkdir()
        for name in sorted(path.stem for path in DEMO_TRAIN.glob("*.png"))[:6]:
            for ending in ("png", "txt"):
                shutil.copy(DEMO_TRAIN / f"{name}.{ending}", pictures)
    # FLUX pads each caption to the most tokens that it reads, which are 512 otherwise.
    model = {"pretrained_model_name_or_path": shallow_model("tiny-flux"), "data_config__max_text_tokens": 48}
    settings = {**model, **SETTINGS, "data_config__img_dir": pictures, **changes}
    return load_config(write_config(folder), overrides(folder / "run", cache, **settings))


def steps_in_log(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "run" / "metrics.jsonl") if line["kind"] == "step"]


plain_forward_backward = training.forward_backward


class Seen:
    """What a run does, as those see it who are told: the optimizer, the log, the tracker, the bar."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.guidance: list[float] = []
        self.tracked: list[tuple[int, dict[str, float]]] = []
        self.images: list[float] = []
        self.disk: list[str] = []
        self.has_gradients: list[bool] = []
        self.asked_whether_swapped = 0

    def before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.rates.append(float(optimizer.param_groups[0]["lr"]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> tuple[Path, Seen]:
    """A run of four steps of two micro-batches of two examples, held to be one of three processes by its figures."""
    folder, seen = tmp_path_factory.mktemp("whole"), Seen()
    enter, save, sync = services.Services.__enter__, Course.save, MetricsLog.sync

    def entered(self: services.Services) -> services.Services:
        accelerator: Any = ThreeOf(self.run.accelerator)
        one, self.run = self.run, replace(self.run, accelerator=accelerator)
        try:
            return enter(self)
        finally:
            self.run = one

    def measured(*arguments: Any) -> Any:
        seen.guidance.append(arguments[6])
        return measure(*arguments)

    def synced(log: MetricsLog) -> None:
        seen.disk.append("log")
        sync(log)

    def saved(course: Course, step: int, *arguments: Any) -> None:
        seen.disk.append(f"checkpoint {step}")
        save(course, step, *arguments)

    def forward_backward(config: Any, family: Any, transformer: torch.nn.Module, backward: Any, batch: Any) -> Any:
        gradients = [weight.grad for weight in transformer.parameters() if weight.requires_grad]
        seen.has_gradients.append(any(bool(gradient.any()) for gradient in gradients if gradient is not None))
        return plain_forward_backward(config, family, transformer, backward, batch)

    def asked(_: SwappedControls, step: int) -> None:
        assert step == 0
        seen.asked_whether_swapped += 1

    handle = register_optimizer_step_pre_hook(seen.before_step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(services.Services, "__enter__", entered)
        patch.setattr(measuring, "measure", measured)
        patch.setattr(training, "forward_backward", forward_backward)
        patch.setattr(SwappedControls, "look", asked)
        patch.setattr(StepFigures, "track", lambda _, step, values: seen.tracked.append((step, dict(values))))
        patch.setattr(StepBar, "figures", lambda _, loss, seconds, images, *rest: seen.images.append(seconds * images))
        patch.setattr(MetricsLog, "sync", synced)
        patch.setattr(Course, "save", saved)
        assert training.train(config_of(folder, warm_cache)).finished
    handle.remove()
    return folder, seen


class ThreeOf:
    """An accelerator that is one of three, to those who only ask it for figures."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator
        self.num_processes = 3

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)


def test_the_optimizer_steps_at_the_rates_of_the_schedule_and_the_log_has_the_same(whole: tuple[Path, Seen]) -> None:
    folder, seen = whole
    assert seen.rates == pytest.approx(RATES, abs=1e-12)
    lines = steps_in_log(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["learning_rate"] for line in lines] == seen.rates


def test_a_step_begins_without_the_gradients_of_the_one_before(whole: tuple[Path, Seen]) -> None:
    _, seen = whole
    assert seen.has_gradients == [False, True] * 4, "and its second micro-batch adds to those of its first"


def test_a_new_run_is_asked_once_whether_its_controls_are_swapped(whole: tuple[Path, Seen]) -> None:
    assert whole[1].asked_whether_swapped == 1


@pytest.mark.parametrize("as_given", [-1.5, 1.5])
def test_swapped_controls_are_a_warning(as_given: float, monkeypatch: pytest.MonkeyPatch) -> None:
    gains = Gains((as_given,) * 8, (-as_given,) * 8)
    monkeypatch.setattr(swapped_controls, "measure_gains", lambda *arguments: gains)
    printed: list[str] = []
    session: Any = MagicMock(is_main=True, print=printed.append)
    SwappedControls(session).look(0)
    assert [line.startswith("warning: ") for line in printed] == [True] * (as_given < 0)


def test_the_held_out_loss_is_measured_with_the_configs_guidance_and_tracked(whole: tuple[Path, Seen]) -> None:
    folder, seen = whole
    assert seen.guidance == [4.0] * 4, "held-out and training pictures, before the first step and after the last"
    lines = read_metrics(folder / "run" / "metrics.jsonl")
    logged = [(line["step"], line["loss"]) for line in lines if line["kind"] == "validation"]
    tracked = [(step, values["held_out_loss"]) for step, values in seen.tracked if "held_out_loss" in values]
    assert tracked == logged and [step for step, _ in tracked] == [0, 4]
    assert [step for step, values in seen.tracked if "loss" in values] == [2, 3, 4], "saved, logged, the last"


def test_pictures_of_all_processes_are_counted_per_second(whole: tuple[Path, Seen]) -> None:
    _, seen = whole
    assert seen.images == pytest.approx([2 * 2 * 3] * 3)


def test_the_log_is_on_disk_before_a_checkpoint_is(whole: tuple[Path, Seen]) -> None:
    _, seen = whole
    assert seen.disk[:4] == ["log", "checkpoint 2", "log", "checkpoint 4"]


class StopAfter(StopRequest):
    """A request to stop that comes while a step is taken."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def requested(self, step: int) -> bool:
        return step >= self.step


def test_the_last_steps_before_a_stop_are_saved_and_logged(tmp_path: Path, warm_cache: Path) -> None:
    outcome = training.train(config_of(tmp_path, warm_cache, validation__held_out=0.0), StopAfter(1))
    assert (outcome.finished, outcome.step) == (False, 1)
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-000001"]
    assert [line["step"] for line in steps_in_log(tmp_path)] == [1]


def test_a_shared_pool_that_runs_out_ends_the_run_saved_and_it_goes_on_with_its_encoders(
    tmp_path: Path, warm_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([None, None, TrainingError("little is left")])
    changes = {"validation__held_out": 0.0, "checkpointing_steps": 100}
    with monkeypatch.context() as patch:
        patch.setattr(RunMemory, "scarcity", lambda memory: next(answers))
        with pytest.raises(TrainingError, match="little is left"):
            training.train(config_of(tmp_path, warm_cache, **changes))
    (saved,) = find_checkpoints(tmp_path / "run")
    assert saved.name == "checkpoint-000003"
    assert load_checkpoint(saved).record["encoders"] == json.loads(json.dumps(asdict(PLAINLY)))

    plans: list[Any] = []

    def prepared(*arguments: Any) -> Any:
        plans.append(arguments[5])
        return prepare_data(*arguments)

    monkeypatch.setattr(assembly, "prepare_data", prepared)
    training.train(config_of(tmp_path, warm_cache, **changes, resume_from_checkpoint="latest"))
    assert plans == [PLAINLY], "and not None, by which this machine would be asked"


# ---- a step's loss


class Plain:
    """A family whose model predicts what it is shown, times its guidance and one weight."""

    def predict_velocity(
        self, weight: Any, noisy_BCHW: Any, sigma_B: Any, conditioning: Any, controls: Any, guidance: float
    ) -> torch.Tensor:
        return guidance * weight * noisy_BCHW


def batch_of(rows: Sequence[int]) -> Batch:
    latents, noise = torch.arange(8.0).view(8, 1, 1, 1), torch.arange(8.0).flip(0).view(8, 1, 1, 1) ** 2
    sigmas = torch.linspace(0.1, 0.8, 8)
    chosen = list(rows)
    return Batch(latents[chosen], noise[chosen], sigmas[chosen], {}, (), [str(row) for row in chosen])


@pytest.mark.parametrize("parts", [[range(4)], [[0, 1, 2], [3]], [[0], [1], [2], [3]]], ids=len)
def test_a_steps_loss_is_the_mean_over_its_examples_however_they_are_split(parts: list[Sequence[int]]) -> None:
    """Captions of several lengths split a micro-batch, and so does a lack of memory."""
    objective = SimpleNamespace(guidance=3.0, weighting_scheme="sigma_sqrt", delta=None)
    config: Any = SimpleNamespace(objective=objective, batch_size=4, gradient_accumulation_steps=2)
    weight: Any = torch.nn.Parameter(torch.tensor(0.5))
    family: Any = Plain()

    losses = [
        training.forward_backward(config, family, weight, torch.Tensor.backward, batch_of(rows)) for rows in parts
    ]

    expected = of_nothing = slope = 0.0
    for row in range(4):
        latent, noise, sigma = float(row), float((7 - row) ** 2), 0.1 + 0.1 * row
        noisy = (1 - sigma) * latent + sigma * noise
        error = 3.0 * 0.5 * noisy - (noise - latent)
        expected += sigma**-2 * error**2 / 8
        of_nothing += sigma**-2 * (noise - latent) ** 2 / 8
        slope += sigma**-2 * 2 * error * 3.0 * noisy / 8
    assert [loss.shape for loss in losses] == [(2, len(rows)) for rows in parts]
    assert torch.cat(losses, dim=1).sum(dim=1).tolist() == pytest.approx([expected, of_nothing], rel=1e-5)
    assert float(weight.grad) == pytest.approx(slope, rel=1e-5)
    assert not any(loss.requires_grad for loss in losses)


def test_masks_and_factors_in_a_steps_loss() -> None:
    """A mask weighs within its example, whose loss stays a mean; a factor weighs the example."""
    objective = SimpleNamespace(guidance=1.0, weighting_scheme="none", delta=0.5)
    config: Any = SimpleNamespace(objective=objective, batch_size=2, gradient_accumulation_steps=1)
    weight: Any = torch.nn.Parameter(torch.tensor(0.0))
    family: Any = Plain()
    latents, noise = torch.zeros(2, 1, 1, 3), torch.tensor([[[[1.0, 2.0, 3.0]]], [[[4.0, 0.0, 0.0]]]])
    masks, factors = torch.tensor([[[[1.0, 0.5, 0.0]]], [[[1.0, 1.0, 0.0]]]]), torch.tensor([1.0, 0.25])
    batch = Batch(latents, noise, torch.tensor([0.5, 0.5]), {}, (), ["one", "two"], masks, factors)

    def huber(error: float) -> float:
        return 2 * 0.5**2 * (math.sqrt(1 + (error / 0.5) ** 2) - 1)

    losses = training.forward_backward(config, family, weight, torch.Tensor.backward, batch)

    expected = [(huber(1) + 0.5 * huber(2)) / 1.5 / 2, 0.25 * huber(4) / 2 / 2]
    assert losses[0].tolist() == pytest.approx(expected), "a weight of 0 predicts nothing"
    assert torch.equal(losses[0], losses[1])


# ---- a run's length


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"),
    [(7, None, 7), (None, 2, 7), (None, 1, 4), (3, 2, 3), (9, 2, 7)],
)
def test_the_limit_that_comes_first_ends_a_run(steps: int | None, epochs: int | None, expected: int) -> None:
    """Epochs of 10 micro-batches, three to a step: the last step of a run may have fewer."""
    config: Any = SimpleNamespace(max_train_steps=steps, num_train_epochs=epochs, gradient_accumulation_steps=3)
    order: Any = Mock(spec=BatchOrder, epoch_end=lambda epoch: 10 * (epoch + 1))
    assert assembly.planned_steps(config, order) == expected
    assert math.isclose(expected, min(filter(None, [steps, epochs and math.ceil(10 * epochs / 3)])))
