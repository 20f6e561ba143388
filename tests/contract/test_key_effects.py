"""contract.md sections 1 and 2: every key is read and does something; docs/contract.md has a line for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pixtune.config import load_config
from pixtune.config.schema import leaf_keys
from pixtune.engine.apply import apply_switches, apply_to_activations, blocks_of
from pixtune.engine.load import load_transformer
from pixtune.errors import PixtuneError
from pixtune.families import family_of
from pixtune.family import Placement
from pixtune.hardware.facts import HardwareFacts
from pixtune.plan.training import TrainingPlan, plan_training
from pixtune.storage.model_folder import open_model_folder
from tests.contract.key_effects import DRAWN, EFFECTS, FRESH_CACHE, MEASURED
from tests.contract.not_yet import needs
from tests.contract.observe import BASE, Observed, observe_run, plan_of, stepped_weights, words
from tests.full_size import full_size_footprint
from tests.runs import TINY_MODEL

PARTS = [pytest.param(key, marks=needs(*effect.unbuilt(key))) for key, effect in EFFECTS.items()]


@pytest.fixture(scope="module")
def observed(scene: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mapping[str, object]], Observed]:
    """Runs as `observe_run` shows them; equal settings run once."""
    known: dict[str, Observed] = {}

    def observe(settings: Mapping[str, object]) -> Observed:
        name = json.dumps({**BASE, **settings}, sort_keys=True)
        if name not in known:
            known[name] = observe_run(settings, scene, tmp_path_factory.mktemp("run"))
        return known[name]

    return observe


def test_every_key_has_an_effect_to_show() -> None:
    assert list(EFFECTS) == list(leaf_keys())


@pytest.mark.parametrize("key", PARTS)
def test_a_key_does_what_it_is_for(
    key: str, scene: Path, tmp_path: Path, observed: Callable[[Mapping[str, object]], Observed]
) -> None:
    effect = EFFECTS[key]

    def shown(value: object) -> object:
        settings = {**effect.given, key: value}
        if effect.part == "plan":
            return plan_of(load_config(None, words({**BASE, **settings}, scene, tmp_path)))
        if effect.part == "stepped":
            return stepped_weights(load_config(None, words({**BASE, **settings}, scene, tmp_path)))
        if effect.after_a_run:
            return outcome(after_a_run(settings, scene, tmp_path / str(value)), effect.part)
        return outcome(observed(settings), effect.part)

    before, after = map(shown, effect.values)
    assert before != after, f"{key} of {effect.values[0]} and of {effect.values[1]} are the same to the {effect.part}"


def outcome(seen: Observed, part: str) -> object:
    """A part of what a run shows; a refusal counts only where refusing is what a key is for.

    Raises:
        PixtuneError: the run's, where a part of a run was asked for.
    """
    error = seen["error"]
    if part == "error":
        return error and str(error)
    if isinstance(error, PixtuneError):
        raise error
    return seen[part]


def after_a_run(settings: Mapping[str, object], scene: Path, run: Path) -> Observed:
    observe_run({}, scene, run)
    return observe_run({**settings, "max_train_steps": 3}, scene, run)


def test_the_same_settings_show_the_same(scene: Path, tmp_path: Path) -> None:
    """Without this, a difference above could be chance."""
    settings = {**DRAWN, **MEASURED, **FRESH_CACHE}
    first, second = (observe_run(settings, scene, tmp_path / name) for name in ("first", "second"))
    assert first == second and first["pictures"] and first["weights"] and first["held-out losses"]


def plain_plan() -> TrainingPlan:
    """A CPU's: nothing is switched on, nothing saved."""
    config = load_config(None, words({**BASE, "data_config.img_dir": "."}, Path(), Path()))
    return plan_training(HardwareFacts("cpu", "x86_64", (0, 0), 0, 0), full_size_footprint(config), config)


@pytest.mark.parametrize("on", [True, False])
def test_switches_of_the_plan_are_switched(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys above that only a GPU shows end here: deterministic, enable_tf32_compute, enable_cudnn_sdp."""
    switched: dict[str, object] = {}
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: switched.update(tf32=name == "high"))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda value: switched.update(cudnn=value))
    monkeypatch.setattr("pixtune.engine.attention.put_first", lambda backend: None)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda value: switched.update(deterministic=value))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    kernel, off = ("cudnn", ()) if on else (None, ("cudnn",))
    apply_switches(replace(plain_plan(), tf32=on, attention=kernel, attention_off=off, deterministic=on))
    assert switched == {"tf32": on, "cudnn": on, **({"deterministic": True} if on else {})}


@pytest.mark.parametrize("num_recomputed", [0, 2])
def test_recomputation_of_the_plan_reaches_the_blocks(num_recomputed: int) -> None:
    """disable_gradient_checkpointing ends here."""
    folder = open_model_folder(str(TINY_MODEL))
    family = family_of(folder)
    transformer = load_transformer(family, folder, Placement(torch.device("cpu"), torch.float32)).module
    apply_to_activations(transformer, family, replace(plain_plan(), recomputed_blocks=num_recomputed))
    runs: list[int] = []
    for number, block in enumerate(blocks_of(transformer, family)):
        block.get_submodule("attn").register_forward_hook(lambda *_, number=number: runs.append(number))
    noisy_BCHW = torch.randn(1, *family.latent_shape(folder, 64, 64), requires_grad=True)
    text = family.stack_conditioning([family.random_text(folder, 4, seed=0)])
    family.predict_velocity(transformer, noisy_BCHW, torch.tensor([0.5]), text).sum().backward()
    num_blocks, _ = family.block_shape(folder)
    assert sorted(runs) == sorted([*range(num_blocks), *range(num_recomputed)])
