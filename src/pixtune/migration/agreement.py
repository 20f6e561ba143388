"""Leaves out of an imported config what its optimizer does not read, and what contradicts it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pixtune.config.optimizing import FINDS_RATE, SCHEDULE_FREE, STEADY, for_this_method, unread
from pixtune.migration.optimizers import ADAMW_RATE
from pixtune.migration.tables import Kind, Leftover, Line

OF_ADAMW = 0.003
"""Learning rate that is too high for AdamW, and usual for Muon without scaling."""
OF_SQUARE_MATRIX = 1 / (0.2 * 3072**0.5)
"""Rate of Muon's steps scaled to AdamW's size, over that of unscaled ones that are as large: the first are 0.2 in root
mean square, and an orthogonal matrix of 3072 rows, as wide as both models, has 1 / sqrt(3072)."""


def agree(lines: dict[str, Line]) -> list[Leftover]:
    """Changes lines that contradict the optimizer, and returns what is lost by that."""
    left: list[Leftover] = []
    chosen = str(_value(lines, "optimizer", "adamw"))
    method = str(_value(lines, "method", "lora"))
    if for_this_method(chosen, method) is not None:
        why = f"{chosen} is not for method: {method} here: AdamW takes its place"
        _drop(lines, "optimizer", why, "changes the result", left)
        if chosen in (*FINDS_RATE, "muon") and float(_value(lines, "learning_rate", 1.0)) >= OF_ADAMW:
            lines["learning_rate"] = Line("learning_rate", ADAMW_RATE, f"a usual rate of AdamW, in place of {chosen}'s")
        chosen = "adamw"
    if chosen == "muon" and float(_value(lines, "learning_rate", 0.0)) >= OF_ADAMW:
        line = lines["learning_rate"]
        rate = round(float(line.value) * OF_SQUARE_MATRIX, 6)
        lines["learning_rate"] = Line("learning_rate", rate, f"{line.origin}, of steps that are not scaled")
        why = f"Muon's steps are as large as AdamW's here, for which {rate:g} is as much in a matrix of 3072 rows"
        left.append(Leftover("changes the result", line.origin, why))
    _agree_on_adapter(lines, method, left)
    if chosen != "adamw":
        _drop(lines, "adam8bit", "only AdamW has states of 8 bits here", "no effect", left)
    if chosen in SCHEDULE_FREE:
        if _value(lines, "lr_scheduler", "constant") not in STEADY:
            why = "an optimizer that averages the weights has a constant rate here"
            _drop(lines, "lr_scheduler", why, "changes the result", left)
        _drop(lines, "ema.decay", "the optimizer averages the weights itself", "changes the result", left)
        _drop(lines, "ema.on_host", "there is no average beside the optimizer's", "no effect", left)
    if _value(lines, "lr_scheduler", "constant") in (*STEADY, "piecewise_constant"):
        _drop(lines, "lr_floor", "the rate does not fall", "no effect", left)
    values = {"optimizer": chosen, **{key: line.value for key, line in lines.items() if key != "optimizer"}}
    for (_, key), _ in list(unread(values)):
        _drop(lines, key, f"optimizer {chosen} does not read it", "no effect", left)
    return left


def _agree_on_adapter(lines: dict[str, Line], method: str, left: list[Leftover]) -> None:
    kind = str(_value(lines, "adapter.kind", "lora"))
    if method == "full":
        _drop(lines, "adapter.kind", "all weights are trained", "no effect", left)
    if kind == "lokr":
        for key in ("lora_alpha", "adapter.rslora"):
            _drop(lines, key, "what a LoKr adds is never scaled here", "changes the result", left)
    if kind != "lokr" or method == "full":
        for key in ("adapter.lokr_factor", "adapter.lokr_low_rank"):
            _drop(lines, key, "it belongs to LoKr", "no effect", left)
    if kind != "lora":
        _drop(lines, "init_lora", f"a {kind} cannot start from a file", "changes the result", left)


def _value(lines: Mapping[str, Line], key: str, otherwise: Any) -> Any:
    return lines[key].value if key in lines else otherwise


def _drop(lines: dict[str, Line], key: str, why: str, kind: Kind, left: list[Leftover]) -> None:
    line = lines.pop(key, None)
    if line is not None and not line.by_default:
        left.append(Leftover(kind, line.origin, why, key))
