"""How long a run makes its captions: each as it is, or the next multiple of some number of tokens.

A step is recorded for one shape, so captions of any length would leave nothing to replay. Attention to padded captions
without a mask (`padded_attention.py`) lets many lengths share a shape.
"""

from __future__ import annotations

from pixtune.config.schema import TrainConfig
from pixtune.fit.rungs import compute_format_of, records_steps

TEXT_MULTIPLE = 64
"""Tokens. Half of it is added to a caption on average: below one percent of a picture's 4096."""


def padded_length(num_tokens: int, multiple: int) -> int:
    """The next multiple, or the same number."""
    return -(-num_tokens // multiple) * multiple


def wanted_multiple(config: TrainConfig, lengths_differ: bool) -> int:
    """Of tokens; what a run on a GPU pads to if its kernels can. Memory is counted, and kernels tried, for that.

    Args:
        lengths_differ: captions come in several numbers of tokens, and the family can pad them.
    """
    can_gain = lengths_differ and records_steps(config)
    # The kernels that take no mask compute in half the width alone.
    return TEXT_MULTIPLE if can_gain and compute_format_of(config) == "bf16" else 1


def choose_text_multiple(
    config: TrainConfig, lengths_differ: bool, recordings: int, cudnn_attention: bool | None, trial_passed: bool
) -> tuple[int, list[str]]:
    """What it does pad to, and why.

    Args:
        recordings: of how many shapes steps are recorded.
        trial_passed: attention to padded captions was tried on this machine, and is right.
    """
    multiple = wanted_multiple(config, lengths_differ) if recordings and cudnn_attention and trial_passed else 1
    if multiple == 1:
        return 1, []
    return multiple, [f"captions padded to multiples of {multiple} tokens, exactly and without a mask: fewer shapes"]
