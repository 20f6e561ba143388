"""Choices of optimizers and schedules that are wrong, or wrong together, are answered with what would be right."""

from __future__ import annotations

import pytest

from pixtune.config import load_config
from pixtune.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optimizer=Prodigy"], 'optimizer is "Prodigy": must be "adamw", "adamw_schedule_free", "prodigy"'),
        (["optimizer=prodigyopt"], 'did you mean "prodigy"?'),
        (["optimizer=adamw8bit"], 'did you mean "adamw" with adam8bit: true?'),
        (["optimizer_type=prodigy"], "did you mean optimizer?"),
        (["network.optimizer_args=[d_coef=2]"], "did you mean optimizer?"),
        (["d_coef=2"], "did you mean prodigy.d_coef?"),
        (["optimizer=prodigy", "prodigy.beta3=0.9"], "prodigy.beta3 is not a known key"),
        (["optimizer=prodigy", "prodigy.d_coef=0"], "prodigy.d_coef is 0: must be greater than 0"),
        (["optimizer=prodigy", "prodigy.growth_rate=0.9"], "prodigy.growth_rate is 0.9: must be greater than 1"),
        (["optimizer=prodigy", "prodigy.slice=0"], "prodigy.slice is 0: must be at least 1"),
        (["optimizer=prodigy", "learning_rate=0"], "learning_rate is 0: must be greater than 0"),
        (
            ["optimizer=prodigy", "method=full"],
            "it is for method: lora, since its one step size depends on all gradients",
        ),
        (["optimizer=muon"], "it is for method: full, since it makes steps of whole matrices orthogonal"),
        (["optimizer=adamw_schedule_free", "method=full"], 'Choose "adamw", "adafactor" or "muon"'),
        (["optimizer=adamw_schedule_free", "lr_scheduler=cosine"], 'choose "constant" or "constant_with_warmup"'),
        (["optimizer=prodigy_schedule_free", "ema.decay=0.9"], "leave ema.decay out"),
        (["optimizer=prodigy_schedule_free", "adam_beta1=0"], "adam_beta1 is 0 and optimizer is"),
        (["optimizer=prodigy_schedule_free", "prodigy.slice=11"], "prodigy.slice is given and optimizer is"),
        (["optimizer=adafactor", "adam_beta1=0.5"], "adam_beta1 is given and optimizer is"),
        (["optimizer=adafactor", "adam8bit=true"], 'only "adamw" has states of 8 bits'),
        (
            ["muon.momentum=0.9"],
            'muon.momentum is given and optimizer is "adamw", which does not read it; "muon" would',
        ),
        (["lr_scheduler=REX"], 'lr_scheduler is "REX": must be "constant"'),
        (["lr_scheduler=cosine_with_min_lr"], 'lr_scheduler is "cosine_with_min_lr": must be'),
        (["min_lr_ratio=0.1"], "did you mean lr_floor?"),
        (["lr_floor=2", "lr_scheduler=cosine"], "lr_floor is 2: must be at most 1"),
        (["lr_floor=0.1"], 'lr_scheduler is "constant", which does not fall to a floor'),
        (["lr_warmup_share=5"], "lr_warmup_share is 5: must be less than 1"),
        (["warmup_ratio=0.1"], "did you mean lr_warmup_share?"),
        (["lr_warmup_share=0.1", "lr_warmup_steps=10"], "choose one of them"),
        (
            ["lr_warmup_share=0.1", "lr_scheduler=piecewise_constant", "lr_step_rules='1:10,0.1'"],
            "which has no warm-up but in its rules",
        ),
    ],
)
def test_one_problem_is_told_in_one_line(faults_of, minimal, words: list[str], told: str) -> None:
    (fault,) = faults_of(minimal, *words)
    assert told in fault, fault


@pytest.mark.parametrize(
    ("value", "ours"),
    [
        ("adamw8bit", '"adamw" with adam8bit: true'),
        ("AdamW_8bit", '"adamw" with adam8bit: true'),
        ("bitsandbytes.optim.PagedAdamW8bit", '"adamw" with adam8bit: true'),
        ("AdamWScheduleFree", '"adamw_schedule_free"'),
        ("prodigy-plus-schedule-free", '"prodigy_schedule_free"'),
        ("Prodigyopt", '"prodigy"'),
    ],
)
def test_names_of_other_trainers_are_told_in_ours(value: str, ours: str) -> None:
    words = ["pretrained_model_name_or_path=m", "output_dir=o", "data_config.img_dir=p", "max_train_steps=1"]
    with pytest.raises(ConfigError) as raised:
        load_config(None, [*words, f"optimizer={value}"], folders_must_exist=False)
    assert f"did you mean {ours}?" in str(raised.value)
