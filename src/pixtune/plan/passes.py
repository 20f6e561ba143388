"""Passes of a sampler's steps: one batch or two, captured or not, and the memory of each way. No torch.

A pass without gradients keeps nothing, so even two examples at once need little beside the weights. Captured passes
keep the memory that they ran in for as long as they live, in a pool that nothing else can use: in `pixtune sample` the
autoencoder comes beside it, in a training run the captured steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pixtune.plan.footprint import ELEMENT_BYTES, Footprint
from pixtune.plan.rungs import CAPTURE_BYTES, FRAGMENTED, QUANTIZED
from pixtune.plan.text_padding import LEAST_MULTIPLE

if TYPE_CHECKING:
    from pixtune.family import ModelFamily

WORKSPACE_BYTES = 64 * 2**20
"""Workspaces of products on the stream that captures, which lie in the captures' pool. torch takes 32 MiB on Hopper and
8 elsewhere, cuBLASLt as much again."""
COMPILED_FROM_STEPS = 20
"""Sampler steps from which on it pays to compile and to capture: compiling takes some 20 s once for a size, and a few
where its code is cached, while a step in 8 bits takes a fifth of a second instead of three quarters."""
MOST_TOKENS_TOGETHER = 2500
"""Tokens of one pass up to which guidance's two are one batch. More of them fill a GPU by themselves, and the padding
of the empty prompt has to be paid: at 4352 tokens a step of Qwen-Image took 0.264 s as one batch and 0.259 as two
passes in bf16, 0.184 and 0.183 in fp8 (H200, `benchmarks/drawing.py`). Fewer were not measured."""
FIRST_PASS = "the first pass compiles the blocks, which takes 10 to 30 s, and a few where the same was compiled before"
"""Announcement of what takes time, as a part of a reason."""


@dataclass(frozen=True)
class PassPlan:
    """Decision on how the passes of sampler steps run."""

    together: bool = False
    """The two passes of guidance are one batch, the shorter prompt padded."""
    captures: int = 0
    """Number of shapes whose passes are captured and replayed."""
    captures_stay: bool = False
    """Captures keep their memory while a picture is decoded."""
    usable_bytes: int = 0
    """Device memory that torch's allocator may use."""

    @property
    def leaner(self) -> PassPlan | None:
        """Next way that needs less memory; None: there is none."""
        if self.captures:
            return replace(self, captures=0, captures_stay=False)
        return replace(self, together=False) if self.together else None

    @property
    def in_words(self) -> tuple[str, ...]:
        """Names the decisions, each as a part of a reason."""
        words = ["both passes of a step as one batch"] if self.together else []
        return (*words, "passes captured and replayed") if self.captures else tuple(words)


PLAIN_PASSES = PassPlan()


def needs_negative(family: ModelFamily, guidance_scale: float) -> bool:
    """Returns whether each step takes a second pass, with the empty prompt."""
    return guidance_scale > 1 and not family.embedded_guidance


@dataclass(frozen=True)
class Abilities:
    """Results of what was tried on the machine that is planned for."""

    compiles: bool = True
    """torch.compile works."""
    pads: bool = True
    """Attention to padded prompts by kernels without a mask is right."""


@dataclass(frozen=True)
class Passes:
    """Passes that are planned, as far as their memory depends on them."""

    footprint: Footprint
    """With the tokens of one pass of one picture."""
    compute_format: str
    weights_format: str
    compiled: bool

    @property
    def can_be_joined(self) -> bool:
        """Whether two of them can be one batch, if prompts can be padded at all."""
        # Kernels that take no mask compute in half the width alone.
        return self.compute_format == "bf16" and self.footprint.num_tokens <= MOST_TOKENS_TOGETHER

    def activation_bytes(self, examples: int = 1) -> int:
        """Returns the peak of activations in a pass; several examples are padded to one length."""
        # The compiler fuses an MLP's input with its codes, so that it does not pass through fp32.
        in_fp32 = self.weights_format in QUANTIZED and not self.compiled
        units = max(k.units.passing_quantized if in_fp32 else k.units.passing for k in self.footprint.kinds)
        tokens = self.footprint.num_tokens if examples == 1 else examples * (self.footprint.num_tokens + LEAST_MULTIPLE)
        return round(units * tokens * self.footprint.width * ELEMENT_BYTES[self.compute_format])

    def pool_bytes(self, examples: int, captures: int) -> int:
        """Returns what captured passes hold: the memory of one, and the code of each.

        The first one's code is counted with the CUDA context.
        """
        if not captures:
            return 0
        held = round((1 + FRAGMENTED["nothing"]) * self.activation_bytes(examples)) + WORKSPACE_BYTES
        return held + (captures - 1) * CAPTURE_BYTES


def pass_bytes(way: PassPlan, passes: Passes) -> int:
    """Returns what passes need beside the weights, captured or not."""
    examples = 2 if way.together else 1
    return passes.pool_bytes(examples, way.captures) if way.captures else passes.activation_bytes(examples)


def needed_bytes(way: PassPlan, passes: Passes, decoding_bytes: int) -> int:
    """Returns what passes, and decoding between them, need beside the weights."""
    needed = pass_bytes(way, passes)
    return needed + decoding_bytes if way.captures_stay else max(needed, decoding_bytes)


def choose_passes(ways: Sequence[PassPlan], needed: Callable[[PassPlan], int], rooms_bytes: Sequence[int]) -> PassPlan:
    """Returns the first way that fits, in the smallest room that holds any; the last way where none does.

    Args:
        ways: fastest first.
        needed: returns the bytes that a way needs.
        rooms_bytes: memory that there is, smallest first.
    """
    fitting = (way for room_bytes in rooms_bytes for way in ways if needed(way) <= room_bytes)
    return next(fitting, ways[-1])


def ways_of_passing(may_join: bool, captures: int, usable_bytes: int) -> tuple[PassPlan, ...]:
    """Returns the ways in which passes can run, fastest first.

    Args:
        may_join: a step has two passes that can be one batch.
        captures: number of shapes to capture; 0: none.
    """
    both = (True, False) if may_join else (False,)
    captured = [
        PassPlan(together, captures, stay, usable_bytes) for stay in (True, False) for together in both if captures
    ]
    return (*captured, *(PassPlan(together, 0, False, usable_bytes) for together in both))
