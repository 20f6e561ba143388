"""The section `adapter`: what is trained beside the frozen weights, and how large it is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pixtune.config.section import Section
from pixtune.config.values import Ranks


class AdapterConfig(Section):
    """Keys of the kind of adapter that is trained beside the frozen weights, and of its ranks."""

    kind: Literal["lora", "lokr", "dora"] = "lora"
    """Kind of adapter: "lora"; "dora", a LoRA with trained lengths of the weights' rows; or "lokr", the Kronecker
    product of two small matrices. DoRA and LoKr steps are slower than those of a LoRA; the plan says so."""
    rank_pattern: Ranks = Field(default={})
    """Ranks of some of the layers, in place of `rank`: names as in `lora_targets` with a rank each, such as {to_q: 32,
    "transformer_blocks.0.*": 8}. Of several names that a layer has, the first one counts. Empty: all have `rank`."""
    rslora: bool = False
    """Whether a LoRA or DoRA is scaled by alpha / sqrt(rank), so that its steps are as large at any rank: with
    `lora_alpha` absent, sqrt(rank) times as large as without. False: by alpha / rank."""
    lokr_factor: Annotated[int, Field(ge=2, le=65_536)] | None = None
    """Size of LoKr's smaller matrix: a side of it is this number if that divides the layer's side, else the largest
    smaller divisor. The smaller it is, the more weights are trained; 65536 gives the fewest. Absent: 16."""
    lokr_low_rank: Literal["none", "larger", "both"] = "none"
    """Choice of those of LoKr's two matrices that are products of rank `rank`, where that is less than half of the
    matrix's side; with "none", `rank` has no effect. What a LoKr adds is never scaled: `lora_alpha` is refused."""
