"""Choice of attention kernel, by what its trial found, what the config says and what the GPU is."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from pixtune.config.schema import TrainConfig
from pixtune.config.sections import CudaFeatures, DataConfig
from pixtune.hardware.cards import facts_as
from pixtune.hardware.facts import HardwareFacts
from pixtune.plan.kernel_choice import AttentionChoice, Finding, choose_attention, findings_of_all, kernels_to_try

H100, SPARK, GH200, CPU = (
    facts_as("H100"),
    facts_as("DGX Spark"),
    facts_as("GH200"),
    HardwareFacts("cpu", "x", (0, 0), 0, 0),
)
CUDNN = Finding(error=0.003, milliseconds=1.49, padded_error=0.004)
FLASH = Finding(error=0.003, milliseconds=2.95, padded_error=0.004)
EFFICIENT = Finding(error=0.003, milliseconds=6.1)
FLASH_3 = Finding(error=0.003, milliseconds=1.2)
ALL = {"cudnn": CUDNN, "flash": FLASH, "efficient": EFFICIENT}
CRASH = Finding("its process ended with exit code -11")
LACKS_MEMORY = Finding("memory was lacking to try it", lacked_memory=True)


def config(deterministic: bool = False, **features: bool | None) -> TrainConfig:
    return TrainConfig(
        pretrained_model_name_or_path="x", output_dir=Path("x"), max_train_steps=1, deterministic=deterministic,
        data_config=DataConfig(img_dir=Path("x")), cuda_features=CudaFeatures(**features),
    )  # fmt: skip


def choose(
    findings: dict[str, Finding] | None = None,
    facts: HardwareFacts = H100,
    flash_3_obstacle: str | None = None,
    **settings: bool,
) -> AttentionChoice:
    return choose_attention(facts, config(**settings), findings, flash_3_obstacle)


# ---- by what was found


def test_the_fastest_right_kernel_is_taken_and_the_times_are_told() -> None:
    choice = choose(ALL)
    assert (choice.kernel, choice.off, choice.pads) == ("cudnn", (), True)
    assert choice.reasons == ("attention by cuDNN: right within 0.3%, 1.49 ms a block; flash 2.95, efficient 6.10",)
    slow = choose({**ALL, "cudnn": replace(CUDNN, milliseconds=3.1)}, SPARK)
    assert (slow.kernel, slow.off, slow.pads) == ("flash", ("cudnn",), True)
    assert "attention by flash: right within 0.3%, 2.95 ms a block; cuDNN 3.10, efficient 6.10" in slow.reasons


@pytest.mark.parametrize(
    ("finding", "words"),
    [
        (CRASH, "its process ended with exit code -11"),
        (Finding("did not end within 120 s"), "did not end within 120 s"),
        (Finding("RuntimeError: no engine"), "RuntimeError: no engine"),
        (replace(CUDNN, error=0.02), "wrong by 0.02 times their size"),
        (replace(CUDNN, error=math.nan), "wrong by nan times their size"),
    ],
    ids=["crashed", "hung", "raised", "wrong", "no number"],
)
def test_a_faulty_kernel_is_dropped_by_name_with_what_was_found(finding: Finding, words: str) -> None:
    for demanded in (None, True):
        choice = choose_attention(H100, config(enable_cudnn_sdp=demanded), {**ALL, "cudnn": finding}, None)
        assert (choice.kernel, choice.off) == ("flash", ("cudnn",))
        notice = "off, though asked for" if demanded else "not used"
        (told,) = [reason for reason in choice.reasons if words in reason]
        assert told.startswith(f"cuDNN attention is {notice}: tried on this machine, ")
        assert "attention by flash: right within 0.3%, 2.95 ms a block; efficient 6.10" in choice.reasons


def test_where_no_kernel_is_right_none_is_used() -> None:
    choice = choose(dict.fromkeys(ALL, CRASH))
    assert (choice.kernel, choice.off, choice.pads) == (None, ("cudnn", "flash", "efficient"), False)
    assert "attention by PyTorch's own choice: no kernel passed its trial" in choice.reasons
    assert len([reason for reason in choice.reasons if "not used" in reason]) == 3


def test_a_kernel_that_lacked_memory_for_its_trial_is_not_taken_and_not_off() -> None:
    choice = choose(dict.fromkeys(ALL, LACKS_MEMORY))
    assert (choice.kernel, choice.off) == (None, ())
    assert choose({**ALL, "flash": LACKS_MEMORY}).off == ()
    assert choose({**ALL, "flash": CRASH}).off == ("flash",)


def test_captions_can_be_padded_where_the_chosen_kernel_can() -> None:
    assert choose({**ALL, "cudnn": CRASH}).pads, "flash attention can"
    assert not choose({"efficient": EFFICIENT}).pads
    assert not choose({**ALL, "cudnn": replace(CUDNN, padded_error=math.inf)}).pads
    assert not choose({**ALL, "cudnn": replace(CUDNN, padded_error=math.nan)}).pads
    assert not choose(enable_cudnn_sdp=True).pads, "nothing was tried"


# ---- by what the config says


def test_cudnn_is_demanded_and_forbidden() -> None:
    slow = {**ALL, "cudnn": replace(CUDNN, milliseconds=9.0)}
    demanded = choose(slow, enable_cudnn_sdp=True)
    assert demanded.kernel == "cudnn"
    assert (
        "attention by cuDNN, as asked: right within 0.3%, 9.00 ms a block; flash 2.95, efficient 6.10"
        in demanded.reasons
    )
    forbidden = {name: finding for name, finding in ALL.items() if name != "cudnn"}
    for findings in (forbidden, ALL, None):
        choice = choose(findings, enable_cudnn_sdp=False)
        assert choice.kernel == ("flash" if findings else None) and choice.off == ("cudnn",)


def test_without_a_trial_demands_are_met_and_nothing_else_is_chosen() -> None:
    """`pixtune plan` starts no CUDA, so it tries nothing."""
    assert choose().kernel is None and choose().reasons == ("attention by PyTorch's own choice: no kernel was tried",)
    assert choose(enable_cudnn_sdp=True).reasons == ("attention by cuDNN, as asked",)
    assert (choose(facts=SPARK).kernel, choose(facts=SPARK, enable_cudnn_sdp=False).kernel) == ("cudnn", None)
    assert choose(facts=SPARK, deterministic=True).kernel is None


def test_deterministic_runs_take_no_kernel_that_is_not() -> None:
    choice = choose({"flash": FLASH, "efficient": EFFICIENT}, deterministic=True, enable_cudnn_sdp=True)
    assert (choice.kernel, choice.off, choice.pads) == ("flash", ("cudnn",), True)
    assert choice.reasons[0].startswith("cuDNN attention is off, though asked for: its backward pass sums in any")
    assert choose(ALL, deterministic=True).kernel == "flash", "even if it had been tried"


def test_a_cpu_is_left_alone() -> None:
    assert choose(facts=CPU) == AttentionChoice(None)
    asked = choose(facts=CPU, enable_cudnn_sdp=True, enable_flash_attention_3=True)
    assert (asked.kernel, asked.off) == (None, ()) and len(asked.reasons) == 2
    assert choose(facts=CPU, enable_cudnn_sdp=False) == AttentionChoice(None)


# ---- FlashAttention 3


def test_flash_attention_3_is_taken_where_it_is_asked_for_and_right() -> None:
    findings = {**ALL, "flash_3": FLASH_3}
    choice = choose(findings, enable_flash_attention_3=True, enable_cudnn_sdp=True)
    assert (choice.kernel, choice.off, choice.pads) == ("flash_3", ("cudnn",), False)
    (reason,) = choice.reasons
    assert reason.startswith("attention by FlashAttention 3, as asked: right within 0.3%, 1.20 ms a block; cuDNN 1.49")
    assert reason.endswith("cuDNN, also asked for, gives way")
    fails = choose({**ALL, "flash_3": CRASH}, enable_flash_attention_3=True)
    assert (fails.kernel, fails.off) == ("cudnn", ("flash_3",))
    assert fails.reasons[0].startswith("FlashAttention 3 is off, though asked for: tried on this machine, its process")


def test_flash_attention_3_that_nobody_asked_for_is_told_of_and_not_taken() -> None:
    choice = choose({**ALL, "flash_3": FLASH_3})
    assert choice.kernel == "cudnn"
    assert "FlashAttention 3 1.20 (used only where enable_flash_attention_3 asks for it)" in choice.reasons[0]


# ---- what is tried


@pytest.mark.parametrize(
    ("facts", "settings", "obstacle", "tried"),
    [
        (H100, {}, None, ("cudnn", "flash", "efficient", "flash_3")),
        (H100, {}, "not installed", ("cudnn", "flash", "efficient")),
        (H100, {"enable_flash_attention_3": False}, None, ("cudnn", "flash", "efficient")),
        (H100, {"enable_cudnn_sdp": False}, "not installed", ("flash", "efficient")),
        (H100, {"enable_cudnn_sdp": True}, "not installed", ("cudnn", "flash", "efficient")),
        (H100, {"deterministic": True}, None, ("flash", "efficient", "flash_3")),
        (SPARK, {"enable_flash_attention_3": True}, None, ("cudnn", "flash", "efficient")),
        (GH200, {}, None, ("cudnn", "flash", "efficient")),
        (GH200, {"enable_flash_attention_3": True}, None, ("cudnn", "flash", "efficient", "flash_3")),
    ],
)
def test_what_cannot_or_may_not_be_used_is_not_tried(
    facts: HardwareFacts, settings: dict[str, bool], obstacle: str | None, tried: tuple[str, ...]
) -> None:
    """On ARM64 (GH200) builds of FlashAttention 3 are reported to crash."""
    facts = replace(facts, machine="aarch64" if facts in (GH200, SPARK) else "x86_64")
    assert kernels_to_try(facts, config(**settings), obstacle) == tried


def test_processes_choose_a_kernel_together() -> None:
    """The worst of each kernel counts; what one of them has not tried, or found wrong, none of them uses."""
    fast = Finding(error=0.001, milliseconds=1.0, padded_error=0.001)
    slow, wrong = replace(fast, milliseconds=9.0), replace(fast, error=math.nan)
    assert findings_of_all([{"cudnn": fast}]) == {"cudnn": fast}
    assert findings_of_all([None, None]) is None and findings_of_all([None, {"flash": fast}]) == {"flash": fast}
    here = {"cudnn": fast, "flash": replace(fast, milliseconds=3.0), "efficient": fast, "flash_3": fast}
    there = {"cudnn": slow, "flash": fast, "efficient": wrong}
    found = findings_of_all([here, there])
    assert found == findings_of_all([there, here]) or (found is not None and math.isnan(found["efficient"].error))
    assert found is not None and list(found) == ["cudnn", "flash", "efficient"]
    assert (found["cudnn"].milliseconds, found["flash"].milliseconds) == (9.0, 3.0)
    assert found["efficient"].fault is not None and found["flash"].fault is None
    alone = [choose_attention(facts_as("H100"), config(), each, None).kernel for each in (here, there)]
    assert alone == ["cudnn", "flash"], "each would choose another one"
    assert choose_attention(facts_as("H100"), config(), found, None).kernel == "flash"
    lacking, broken = Finding("no memory", lacked_memory=True), Finding("it crashed")
    both = findings_of_all([{"flash": lacking}, {"flash": broken}])
    assert both is not None and not both["flash"].lacked_memory, "one that crashed is not excused by the other"
    only = findings_of_all([{"flash": lacking}, {"flash": fast}])
    assert only is not None and only["flash"].lacked_memory and only["flash"].fault is not None
