"""Which kernels a plan allows: what the config asks for, where this GPU has it, with the reason. No torch."""

from __future__ import annotations

from pixtune.config.schema import TrainConfig
from pixtune.hardware.facts import HOPPER, HardwareFacts


def choose_tf32(facts: HardwareFacts, config: TrainConfig) -> tuple[bool, list[str]]:
    asked = config.cuda_features.enable_tf32_compute
    if asked is not None:
        return asked, []
    major, minor = facts.capability
    on = facts.capability >= (8, 0)
    return on, [f"TF32 {'on' if on else 'off'}: compute capability {major}.{minor}"]


def choose_flash_attention_3(facts: HardwareFacts, config: TrainConfig, obstacle: str | None) -> tuple[bool, list[str]]:
    """Where it cannot run a config that asks for it runs without: the same file serves GPUs of several kinds."""
    if not config.cuda_features.enable_flash_attention_3:
        return False, []
    if facts.device != "cuda" or facts.capability != HOPPER:
        obstacle = f"it runs on Hopper (compute capability 9.0) alone, and this is {facts.name}"
    if obstacle is not None:
        return False, [f"FlashAttention 3 off, though asked for: {obstacle}"]
    gives_way = "; cuDNN's, asked for as well, gives way" if config.cuda_features.enable_cudnn_sdp else ""
    return True, [f"FlashAttention 3 in place of PyTorch's other attention kernels, as asked{gives_way}"]


def choose_cudnn_attention(
    facts: HardwareFacts, config: TrainConfig, trial: tuple[bool, str] | None
) -> tuple[bool | None, list[str]]:
    asked = config.cuda_features.enable_cudnn_sdp
    if asked is not None:
        return asked, []
    if trial is None:
        return (True, ["cuDNN attention on: the stable choice on DGX Spark"]) if facts.integrated else (None, [])
    passed, finding = trial
    return passed, [f"cuDNN attention {'allowed' if passed else 'off'}: tried on this machine, {finding}"]
