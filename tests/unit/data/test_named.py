"""Pictures that the config leaves out, weights, holds out, or tries captions on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pixtune.config import load_config
from pixtune.config.schema import TrainConfig
from pixtune.data.buckets import Framing
from pixtune.data.example_table import Example
from pixtune.data.held_out import hold_out
from pixtune.data.named import with_loss_weights, without_excluded
from pixtune.data.rivals import FEW, MANY, choose_trials, not_judged
from pixtune.errors import ConfigError, DataError


def example(number: int, size: int = 64, caption: str = "", digest: str = "", controls: int = 0) -> Example:
    made = Example(
        f"{number:03d}.png", Path(f"{number}.png"), caption or f"thing {number}",
        (Framing(size, size, 1.0, (0.0, 0.0, 1.0, 1.0), 0.0),), (Path("control.png"),) * controls,
    )  # fmt: skip
    vars(made)["image_digest"] = digest or f"digest {number}"
    return made


def config(**changes: Any) -> TrainConfig:
    words = ["pretrained_model_name_or_path=x", "output_dir=x", "data_config.img_dir=x", "max_train_steps=100"]
    words += [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return load_config(None, words, folders_must_exist=False)


def test_named_pictures_are_left_out_and_unknown_names_are_errors() -> None:
    examples = [example(number) for number in range(5)]
    assert without_excluded(examples, []) == examples
    assert [each.name for each in without_excluded(examples, ["001.png", "003"])] == ["000.png", "002.png", "004.png"]
    with pytest.raises(DataError) as raised:
        without_excluded(examples, ["002.jpg", "entirely else", "004"])
    told = str(raised.value)
    assert "'002.jpg', and no picture has that name; did you mean 002.png?" in told
    assert "'entirely else', and no picture has that name; there are 5 others" in told
    with pytest.raises(DataError, match="names all 5 pictures"):
        without_excluded(examples, [each.name for each in examples])


def test_named_pictures_count_by_their_weights() -> None:
    examples = [replace(example(number), loss_weight=0.5) for number in range(3)]
    training, _ = hold_out(examples, config(data_config__loss_weights="{'001': 0.2, 002.png: 3}"))
    assert [each.loss_weight for each in training] == pytest.approx([0.5, 0.1, 1.5])
    assert with_loss_weights(examples, {}) == examples
    with pytest.raises(DataError, match=r"data_config\.loss_weights names '01', and no picture .* mean 001\?"):
        with_loss_weights(examples, {"01": 0.5})
    with pytest.raises(DataError, match=r"names 001\.png twice: 001, 001\.png"):
        with_loss_weights(examples, {"001": 0.5, "001.png": 0.4})
    for wrong in ("{'001': 0}", "{'001': -1}", "{'001': nan}", "['001']", "{'001': much}"):
        with pytest.raises(ConfigError, match=r"data_config\.loss_weights"):
            config(data_config__loss_weights=wrong)


def test_excluded_pictures_are_neither_trained_on_nor_held_out() -> None:
    examples = [example(number) for number in range(48)]
    training, held_out = hold_out(examples, config(data_config__exclude="['007',008.png]"))
    names = {each.name for each in (*training, *held_out)}
    assert len(names) == 46 and not {"007.png", "008.png"} & names


def test_by_itself_a_twentieth_of_many_is_held_out_and_no_size_loses_its_last_picture() -> None:
    told: list[str] = []
    examples = [example(number, size=64 if number < 38 else 64 + 32 * number) for number in range(48)]
    training, held_out = hold_out(examples, config(), told.append)
    assert len(held_out) == 4 and len(training) == 44 and "4 of 48 pictures are held out" in told[0]
    assert all(each.framings[0].size == (64, 64) for each in held_out), "all other sizes have one picture"
    assert hold_out(examples[::-1], config())[1] == held_out[::-1], "whatever their order is"
    assert hold_out(examples[:39], config(), told.append) == (examples[:39], []) and len(told) == 1
    hold_out(examples[:39], config(validation__patience=3), told.append)
    assert told[1:] == ["validation.patience waits in vain: of 39 pictures none is held out by itself."]
    assert hold_out(examples, config(random_weights="true")) == (examples, [])
    assert hold_out(examples, config(validation__held_out=0)) == (examples, [])


def test_copies_are_held_out_together_and_a_lone_size_is_told_where_the_share_is_given() -> None:
    copies = [example(number, digest="one" if number % 2 else "") for number in range(40)]
    training, held_out = hold_out(copies, config())
    assert not {each.image_digest for each in training} & {each.image_digest for each in held_out}
    told: list[str] = []
    lone = [example(number, size=64 + 32 * number) for number in range(4)]
    hold_out(lone, config(validation__held_out=0.5), told.append)
    assert len(told) == 1 and told[0].startswith("no picture of their size is left to train on"), told


def test_captions_are_tried_where_that_is_cheap_and_they_differ() -> None:
    examples = [example(number) for number in range(20)]
    assert not choose_trials(examples, config(), False).each, "5 turns of each picture are too few"
    assert not choose_trials(examples, config(max_train_steps=800, num_train_epochs=39), False).each
    trials = choose_trials(examples, config(max_train_steps=800), False).each
    assert [trial.example for trial in trials] == [*range(20)]
    assert all(len({*trial.rivals} - {trial.example}) == MANY for trial in trials)
    tried = [rival for trial in trials for rival in trial.rivals]
    assert {tried.count(number) for number in range(20)} == {MANY}, "each as often as any other"
    always = config(validation__judge_captions="true")
    assert choose_trials(examples, always, False).each == trials
    judges = choose_trials(examples, always, False).judges
    assert len(set(judges)) == len(judges) == MANY + 1, "that ten are left where one is the caption's own"
    edits = [example(number, controls=1) for number in range(20)]
    assert choose_trials(edits, always, True).judges == () and choose_trials(edits, always, False).judges == judges
    assert {len(trial.rivals) for trial in choose_trials(edits, always, True).each} == {FEW}
    same = choose_trials([example(number, caption="sks") for number in range(20)], always, False)
    assert not same.each and "at least 8 different ones are needed" in not_judged(same, always)[0]
    assert not not_judged(same, config()) and not not_judged(choose_trials(edits, always, True), always)
    assert not choose_trials(examples, config(validation__judge_captions="false", max_train_steps=9999), False).each
