"""A checkpoint is resumed with settings that leave every step as it was, and with no others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest

from pixtune.config import to_dict
from pixtune.config.schema import FORMER_KEYS, LR_SCHEDULERS, TrainConfig
from pixtune.errors import CheckpointError
from pixtune.storage.checkpoint import Checkpoint
from pixtune.storage.lineage import read_lineage
from pixtune.storage.resume import (
    FIXED,
    LATER_KEYS,
    LENGTH_FREE_SCHEDULES,
    RATE_KEYS,
    RULES,
    RunIdentity,
    config_hash,
    flatten,
    refuse_other_run,
)
from pixtune.trained.schedule import build_schedule

REQUIRED = {
    "pretrained_model_name_or_path": "x",
    "output_dir": "out",
    "data_config": {"img_dir": "pictures"},
    "max_train_steps": 100,
}


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**REQUIRED, **changes})


def run(num_processes: int | None = 1, num_steps: int | None = 100, data: str = "d", **changes: Any) -> RunIdentity:
    return RunIdentity(to_dict(config(**changes)), data, num_processes, num_steps)


def refusal(before: RunIdentity, now: RunIdentity, record: Mapping[str, Any] | None = None) -> str:
    """The message; empty where the checkpoint is accepted."""
    path = Path("run/checkpoint-000005")
    checkpoint = Checkpoint(5, {}, dict(record or before.to_dict()), path, read_lineage(None, 5))
    try:
        refuse_other_run(checkpoint, now)
    except CheckpointError as error:
        return str(error)
    return ""


def test_the_same_run_is_accepted() -> None:
    assert refusal(run(), run()) == ""


def test_a_key_that_the_checkpoints_version_did_not_know_had_its_defaults_effect() -> None:
    older = run().to_dict()
    older["config"] = {
        key: value for key, value in older["config"].items() if key not in ("max_grad_norm", "objective")
    }
    assert refusal(run(), run(), older) == ""
    assert "  - max_grad_norm: was 1.0, is 0.5\n" in refusal(run(), run(max_grad_norm=0.5), older)
    assert "objective.shift: was 'model', is 'none'" in refusal(run(), run(objective={"shift": "none"}), older)


def test_keys_that_came_later_and_are_not_set_leave_a_configs_name() -> None:
    """The name is written into LoRA files, and stays what it was for runs that do not use what is new."""
    now = run().config
    older = {key: value for key, value in now.items() if key not in LATER_KEYS}
    assert config_hash(now) == config_hash(older) and older != now
    changes: list[dict[str, Any]] = [
        {"optimizer": "prodigy"},
        {"lr_scheduler": "rex", "lr_floor": 0.1},
        {"lr_warmup_share": 0.1},
    ]
    names = [config_hash(run(**each).config) for each in [*changes, {"optimizer": "prodigy", "prodigy": {"slice": 11}}]]
    assert len({config_hash(now), *names}) == 5


@pytest.mark.parametrize(
    ("key", "now"),
    [
        ("optimizer", {"optimizer": "adafactor"}),
        ("prodigy.slice", {"optimizer": "prodigy", "prodigy": {"slice": 11}}),
        ("adafactor.momentum", {"optimizer": "adafactor", "adafactor": {"momentum": 0.9}}),
    ],
)
def test_what_decides_an_optimizers_states_cannot_change_within_a_run(key: str, now: dict[str, Any]) -> None:
    before = {} if key == "optimizer" else {"optimizer": now["optimizer"]}
    message = refusal(run(**before), run(**now, resume_with_changes_in=[key]))
    assert f"  - {key}: was" in message and f"{key} cannot change" in message


def test_a_warm_up_by_share_ties_a_run_to_its_length() -> None:
    longer: dict[str, Any] = {"max_train_steps": 200, "lr_warmup_share": 0.1}
    message = refusal(run(lr_warmup_share=0.1), run(num_steps=200, **longer))
    assert "another length is another warm-up" in message and "lr_warmup_steps" in message
    assert refusal(run(lr_warmup_steps=10), run(num_steps=200, max_train_steps=200, lr_warmup_steps=10)) == ""


def test_every_difference_is_named_with_both_values() -> None:
    message = refusal(run(seed=1), run(seed=2, learning_rate=0.5, objective={"shift": "none"}, data="other"))
    assert "run/checkpoint-000005" in message
    assert "  - learning_rate: was 0.0001, is 0.5\n" in message and "  - seed: was 1, is 2 (all noise" in message
    assert "  - objective.shift: was 'model', is 'none'\n" in message and "the data set" in message
    assert message.endswith("resume_with_changes_in='[learning_rate, objective.shift, seed, data]'")
    assert "  - train anew, and keep this run: output_dir=out-2\n  - go on from step 5 with the change" in message


def test_examples_that_have_changed_are_named() -> None:
    """By hand: one caption and one picture are others, one example is new and one is gone."""
    before = replace(run(), examples={"a": "11-22", "b": "33-44", "c": "55-66", "d": "77-88"})
    now = replace(run(data="other"), examples={"a": "12-22", "b": "33-45", "c": "55-66", "e": "99-00"})
    assert "caption of a; picture, control or mask of b; new: e; no longer there: d\n" in refusal(before, now)
    many = replace(
        run(data="other"), examples={f"n{number}": "1-2" for number in range(9)} | dict(before.examples or {})
    )
    assert "new: n0, n1, n2 and 6 more\n" in refusal(before, many)
    unnamed = refusal(replace(before, examples=None), now)
    assert "the data set has changed (pictures, captions or their encodings are not" in unnamed


def test_a_finished_run_needs_more_steps_to_go_on_with_a_change() -> None:
    before = run(num_steps=5, max_train_steps=5)
    assert "and a larger max_train_steps, since all steps are taken" in refusal(before, replace(before, data="other"))
    assert "larger" not in refusal(run(), run(data="other"))


def test_what_leaves_the_steps_alone_may_change() -> None:
    changed: dict[str, Any] = {
        "output_dir": "moved",
        "pretrained_model_name_or_path": "moved",
        "data_config": {"img_dir": "moved", "num_workers": 0},
        "samples": {"prompts": ["a cat"], "every": 3},
        "validation": {"every": 7},
        "trigger_words": ["sks"],
    }
    assert refusal(run(), run(**changed)) == ""
    assert "validation.num_draws" in refusal(run(), run(validation={"num_draws": 7})), "not all of the section"


def test_folders_may_move_but_not_be_used_otherwise() -> None:
    def of(*folders: dict[str, Any]) -> RunIdentity:
        return run(data_config={"folders": [{"repeats": 2.0, **each} for each in folders]})

    before = of({"img_dir": "a", "name": "n"}, {"img_dir": "b"})
    assert refusal(before, of({"img_dir": "moved", "name": "n"}, {"img_dir": "c", "control_dir": "d"})) == ""
    older = before.to_dict()
    for folder in older["config"]["data_config"]["folders"]:
        del folder["flip"], folder["caption_prefix"]  # a version that did not know these keys
    assert refusal(before, of({"img_dir": "a", "name": "n"}, {"img_dir": "b"}), older) == ""
    for now, named in (
        (of({"img_dir": "a", "name": "n"}), "were 2, are 1"),
        (of({"img_dir": "a", "name": "n"}, {"img_dir": "b", "repeats": 1.0}), "[1].repeats was 2.0, is 1.0"),
        (of({"img_dir": "a", "name": "n", "flip": True}, {"img_dir": "b"}), "[0].flip was None, is True"),
    ):
        assert f"data_config.folders: {named} (other pictures would meet" in refusal(before, now)


def test_rules_are_of_keys_that_there_are() -> None:
    keys = flatten(to_dict(config()))
    sections = {"samples", "guard", "lora_files", "model_parts", "distributed"}
    assert RULES.keys() - keys.keys() == {"num_processes", *sections, *FORMER_KEYS}


# ---- length


@pytest.mark.parametrize("name", get_args(LR_SCHEDULERS))
def test_the_schedules_that_do_not_depend_on_the_length_are_known(name: str) -> None:
    settings = {"lr_scheduler": name, "lr_warmup_steps": 3}
    if name == "piecewise_constant":
        settings["lr_step_rules"] = "1:10,0.1"
    one, other = (build_schedule(config(**settings), num_steps) for num_steps in (100, 200))
    assert all(one(step) == other(step) for step in range(100)) == (name in LENGTH_FREE_SCHEDULES)


@pytest.mark.parametrize("name", LENGTH_FREE_SCHEDULES)
def test_a_run_with_such_a_schedule_may_become_longer(name: str) -> None:
    settings: dict[str, Any] = {"lr_scheduler": name}
    if name == "piecewise_constant":
        settings["lr_step_rules"] = "1:10,0.1"
    assert refusal(run(**settings), run(num_steps=200, max_train_steps=200, **settings)) == ""


@pytest.mark.parametrize("name", [name for name in get_args(LR_SCHEDULERS) if name not in LENGTH_FREE_SCHEDULES])
def test_under_other_schedules_another_length_is_refused(name: str) -> None:
    message = refusal(run(lr_scheduler=name), run(num_steps=200, lr_scheduler=name, max_train_steps=200))
    assert f"max_train_steps: was 100, is 200 (with lr_scheduler '{name}'" in message
    assert "another learning rate at every step" in message and "constant_with_warmup" in message
    assert "output_dir=out-2" in message


def test_epochs_are_a_length_too() -> None:
    before = run(lr_scheduler="cosine", num_train_epochs=2, max_train_steps=None)
    now = run(num_steps=150, lr_scheduler="cosine", num_train_epochs=3, max_train_steps=None)
    assert "num_train_epochs: was 2, is 3" in refusal(before, now)


def test_the_same_length_in_other_words_is_the_same_length() -> None:
    before = run(lr_scheduler="cosine")
    assert refusal(before, run(lr_scheduler="cosine", num_train_epochs=1000)) == ""
    without_length = {key: value for key, value in before.to_dict().items() if key != "num_steps"}
    now = run(lr_scheduler="cosine", num_train_epochs=1000)
    assert "num_train_epochs: was absent, is 1000" in refusal(before, now, without_length), "an older checkpoint"


# ---- processes


def test_another_number_of_processes_is_refused() -> None:
    message = refusal(run(num_processes=2), run(num_processes=1))
    assert "num_processes: was 2, is 1 (a batch of all processes together would have size 1 instead of 2" in message
    assert "Keep train_batch_size times the number of processes at 2" in message and "output_dir" in message


@pytest.mark.parametrize("place", ["top", "data_config"])
def test_processes_and_batch_size_with_the_same_product_are_accepted(place: str) -> None:
    in_section = {"data_config": {"img_dir": "pictures", "train_batch_size": 2}}
    now = run(num_processes=1, **({"train_batch_size": 2} if place == "top" else in_section))
    assert refusal(run(num_processes=2), now) == ""
    assert refusal(now, run(num_processes=2)) == ""
    message = refusal(now, run(num_processes=2, train_batch_size=2))
    assert "num_processes: was 1, is 2" in message and "size 4 instead of 2" in message


def test_an_older_checkpoint_without_processes_is_accepted_and_its_batch_size_still_counts() -> None:
    older = {key: value for key, value in run().to_dict().items() if key not in ("num_processes", "num_steps")}
    assert refusal(run(), run(num_processes=2), older) == ""
    assert "train_batch_size: was absent, is 3" in refusal(run(), run(train_batch_size=3), older)


def test_what_is_compared_is_what_a_checkpoint_records() -> None:
    assert run().to_dict().keys() == {"config", "data", "num_processes", "num_steps", "base", "examples"}
    assert "examples" not in run().in_short(), "a lineage has a line for each session"


# ---- what is recognized by content, and what is known only later


def with_base(base: str | None, **changes: Any) -> RunIdentity:
    return replace(run(**changes), base=base)


def test_another_base_model_is_refused_with_what_it_means_and_an_unrecorded_one_is_not() -> None:
    assert refusal(with_base("a"), with_base("a", pretrained_model_name_or_path="moved")) == ""
    message = refusal(with_base("a"), with_base("b"))
    assert "  - base_model: another than the checkpoint's (the weights are others" in message
    assert "resume_with_changes_in='[base_model]'" in message
    older = {key: value for key, value in run().to_dict().items() if key != "base"}
    assert refusal(run(), with_base("b"), older) == ""


def test_what_is_not_known_yet_is_compared_when_it_is() -> None:
    before = with_base("a", lr_scheduler="cosine", num_train_epochs=2, max_train_steps=None)
    later = with_base("a", lr_scheduler="cosine", num_train_epochs=3, max_train_steps=None, data="other")
    assert refusal(before, replace(later, data=None, num_steps=None)) == ""
    message = refusal(before, replace(later, num_steps=150))
    assert "num_train_epochs: was 2, is 3" in message and "  - data: " in message


def test_fewer_steps_than_the_checkpoint_has_are_refused() -> None:
    message = refusal(run(), run(num_steps=4, max_train_steps=4))
    assert "run/checkpoint-000005 is of step 5, and the run is to have 4 steps" in message
    assert "pixtune export run/checkpoint-000005" in message
    assert refusal(run(), run(num_steps=5, max_train_steps=5)) == "", "nothing is left to train, and it is right"


# ---- changes that a user asks for


def changes_of(before: RunIdentity, now: RunIdentity) -> tuple[str, ...]:
    checkpoint = Checkpoint(5, {}, before.to_dict(), Path("run/checkpoint-000005"), read_lineage(None, 5))
    return refuse_other_run(checkpoint, now, lambda identity, step: identity.config["learning_rate"] * step)


def test_what_the_config_names_may_change_and_is_returned() -> None:
    now = run(learning_rate=0.5, data="other", resume_with_changes_in=["learning_rate", "data", "rank"])
    first, second, third = changes_of(run(), now)
    assert first == "learning_rate: was 0.0001, is 0.5" and second.startswith("data: the data set has changed")
    assert third == "The learning rate goes from 0.0004 at step 5 to 2.5 at step 6."
    assert changes_of(now, now) == (), "of the next session, nothing has changed"


def test_nothing_else_may_change_and_the_remedy_names_all() -> None:
    message = refusal(run(), run(learning_rate=0.5, seed=1, resume_with_changes_in=["seed"]))
    assert "  - learning_rate" in message and "  - seed" not in message
    assert "resume_with_changes_in='[seed, learning_rate]'" in message


@pytest.mark.parametrize(
    "changes", [{"rank": 3}, {"quantize": True}, {"cuda_features": {"enable_fp8_training": True}}, {"method": "full"}]
)
def test_what_is_trained_and_the_plan_never_change(changes: dict[str, Any]) -> None:
    (key,) = flatten(changes)
    message = refusal(run(), run(**changes, resume_with_changes_in=[key]))
    assert f"{key} cannot change." in message and "resume_with_changes_in" not in message


def test_what_never_changes_are_keys_that_there_are() -> None:
    keys = flatten(to_dict(config())).keys()
    assert all(any(key == name or key.startswith(f"{name}.") for key in keys) for name in FIXED)
    assert set(RATE_KEYS) <= keys


@pytest.mark.parametrize("name", ["data", "base_model", "num_processes", "objective.shift"])
def test_names_of_what_may_change(name: str) -> None:
    assert config(resume_with_changes_in=[name]).resume_with_changes_in == (name,)


def test_a_misspelt_name_of_what_may_change_is_a_problem() -> None:
    with pytest.raises(ValueError, match="'learning_rat' is none; did you mean learning_rate"):
        config(resume_with_changes_in=["learning_rat"])
