"""Conversions of optimizers, learning rates and schedules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pixtune.migration import conversions as to
from pixtune.migration.rules import Convert, Look, Lost, Outcome, Rule

ADAMW_RATE = 1e-4
"""Learning rate here by default, for where the rate there is a factor of another optimizer's own."""


_ADAMW_8BIT = (
    "adamw8bit",
    "pagedadamw8bit",
    "bnbadamw8bit",
    "bnbadamw8bitpaged",
    "aoadamw8bit",
    "adamw8",
    "adamw8bitkahan",
)
_ADAMW = (
    "adamw", "adamwbf16", "adamwoptimi", "optimiadamw", "bnbadamw", "bnbadamwpaged", "pagedadamw", "pagedadamw32bit",
    "torchoptimadamw", "stableadamw", "optimistableadamw", "stableadamwunfused", "offload", "adamwadv",
)  # fmt: skip
_ADAM = ("adam", "adam8bit", "adam8", "bnbadam", "bnbadam8bit", "optimiadam")
_BY_OURS: Mapping[str, tuple[str, ...]] = {
    "prodigy": ("prodigy", "prodigyopt", "prodigy8bit", "prodigyadv"),
    "prodigy_schedule_free": ("prodigyschedulefree", "prodigyplus", "prodigyplusschedulefree"),
    "adamw_schedule_free": ("adamwschedulefree", "schedulefreeadamw", "adamwschedulefreekahan", "adamwsf"),
    "adafactor": ("adafactor", "bnbadafactor", "adafactoradv"),
    "muon": (
        "muon", "muonwithadamw", "muonwithauxadam", "singledevicemuon", "singledevicemuonwithauxadam", "muonadv",
        "muonclip",
    ),
}  # fmt: skip
"""Names of other optimizers, by the one here."""
_OWN_RATE = ("dadapt", "dadaptation")
"""Beginnings of the names of optimizers without a counterpart that find their rate: a rate there is a factor near 1."""


def optimizer(value: Any, look: Look) -> Any:
    """Returns the optimizer; AdamW for those that are not here."""
    name = to.plain_name(value)
    if name in _ADAMW_8BIT:
        return Outcome({"adam8bit": True})
    if name in _ADAMW:
        return Outcome({"adam8bit": False})
    if name in _ADAM:
        why = "Adam adds its weight decay to the gradient and AdamW does not; without weight decay they are the same"
        return Outcome({"adam8bit": "8" in name}, (Lost(why),))
    for ours, names in _BY_OURS.items():
        if name in names:
            relative = Lost("the rate is learning_rate here; relative_step of Adafactor finds its own")
            return Outcome({"optimizer": ours}, (relative,) if ours == "adafactor" and _steps_relatively(look) else ())
    return Lost("AdamW takes its place, for which another learning rate may be right")


def _steps_relatively(look: Look) -> bool:
    """Returns whether Adafactor finds its rate: always in kohya's trainers, unless an argument says no."""
    arguments = str(look.peek("optimizer_args", "")).casefold().replace(" ", "")
    return look.peek("optimizer.relative_step") is True or (
        "optimizer_type" in look.defaults and "relative_step=false" not in arguments
    )


def rate(optimizer_key: str) -> Convert:
    """Makes a conversion of the learning rate, which is AdamW's own only where the optimizer there finds none."""

    def convert(value: Any, look: Look) -> Any:
        found = float(to.number(value))
        name = look.peek(optimizer_key)
        if isinstance(name, str) and to.plain_name(name).startswith(_OWN_RATE) and found >= 0.01:
            why = f"it is a factor of a rate that the optimizer there finds; {ADAMW_RATE:g} is usual for AdamW"
            return Outcome({"learning_rate": ADAMW_RATE}, (Lost(why),))
        return found

    return convert


def is_prodigy(name: Any) -> bool:
    """Returns whether an optimizer is Prodigy, with or without schedule-free averaging."""
    return isinstance(name, str) and to.plain_name(name).startswith("prodigy")


def defaults_of_others(optimizer_key: str) -> tuple[Rule, ...]:
    """Makes rules of what Prodigy and Adafactor there begin with and those here do not."""

    def only(names: str) -> Convert:
        def convert(value: Any, look: Look) -> Any:
            name = to.plain_name(look.peek(optimizer_key) or "")
            return value if name.startswith(tuple(names.split())) else Lost("belongs to another optimizer", False)

        return convert

    return (
        Rule("(Prodigy has use_bias_correction off)", "prodigy.bias_correction", only("prodigy"), default=False),
        Rule("(Prodigy has safeguard_warmup off)", "prodigy.safeguard_warmup", only("prodigy"), default=False),
        Rule("(its weight decay is 0)", "adam_weight_decay", only("prodigy adafactor"), default=0.0),
    )


def growth(value: Any, look: Look) -> Any:
    """Returns the largest growth of Prodigy's step size; infinity is none."""
    if str(value).casefold() in ("inf", "infinity"):
        return Lost("no limit, as here", False)
    return to.real(value)


_SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "rex")
_NEAR_SCHEDULES = {
    "cosine_with_min_lr": ("cosine", ""),
    "cosine_with_hard_restarts": ("cosine_with_restarts", ""),
    "sine": ("cosine", "it swings up and down; cosine falls once"),
    "inverse_sqrt": ("linear", "linear is the nearest"),
    "warmup_stable_decay": ("constant_with_warmup", "the rate does not fall at the end here"),
    "adafactor": ("constant", "the rate follows lr_scheduler here"),
    "step": ("constant", "for steps of the rate write piecewise_constant with lr_step_rules"),
}


def schedule(value: Any, look: Look) -> Any:
    name = to.text(value).casefold()
    if name in _SCHEDULES:
        return name
    near, why = _NEAR_SCHEDULES.get(name, ("constant", "there is no such schedule here; constant takes its place"))
    return Outcome({"lr_scheduler": near}, (Lost(why),) if why else ())


def optimizer_arguments(value: Any, look: Look) -> Outcome:
    """Returns arguments of an optimizer: ["weight_decay=0.01", "betas=0.9,0.99"], a text or a mapping."""
    values: dict[str, Any] = {}
    unknown = []
    for key, given in pairs(value):
        if key in ("betas", "beta", "adam_betas"):
            betas = given if isinstance(given, list | tuple) else str(given).strip("()[] ").split(",")
            names = ("adam_beta1", "adam_beta2")
            values |= {name: to.real(beta) for name, beta in zip(names, betas, strict=False)}
        elif key in _ARGUMENTS:
            ours, convert = _ARGUMENTS[key]
            result = convert(given, look)
            values |= {} if isinstance(result, Lost) else {ours: result}
        elif key != "decouple" or not to.truth(given):
            unknown.append(f"{key}={given}")
    why = f"{', '.join(unknown)[:200]}: there are no such arguments here"
    return Outcome(values, (Lost(why),) if unknown else ())


_ARGUMENTS: Mapping[str, tuple[str, Convert]] = {
    "weight_decay": ("adam_weight_decay", to.real), "eps": ("adam_epsilon", to.real),
    "beta1": ("adam_beta1", to.real), "beta2": ("adam_beta2", to.real),
    "d0": ("prodigy.d0", to.real), "d_coef": ("prodigy.d_coef", to.real),
    "growth_rate": ("prodigy.growth_rate", growth), "slice_p": ("prodigy.slice", to.whole),
    "safeguard_warmup": ("prodigy.safeguard_warmup", to.truth),
    "use_bias_correction": ("prodigy.bias_correction", to.truth),
    "momentum": ("muon.momentum", to.real), "muon_momentum": ("muon.momentum", to.real),
    "nesterov": ("muon.nesterov", to.truth), "ns_steps": ("muon.ns_steps", to.whole),
    "muon_weight_decay": ("adam_weight_decay", to.real), "adam_eps": ("adam_epsilon", to.real),
}  # fmt: skip
"""Arguments of optimizers there, each with its key here; `agree` leaves out what the chosen one does not read."""


def pairs(value: Any) -> list[tuple[str, Any]]:
    """Returns arguments as names with values: ["a=1", "b=2"], a text of them, or a mapping."""
    if isinstance(value, Mapping):
        return [(str(key), given) for key, given in value.items()]
    words = value if isinstance(value, list | tuple) else split_outside_brackets(to.text(value))
    pairs = [str(word).strip().strip("\"'").partition("=") for word in words if str(word).strip()]
    return [(key.strip(), given.strip().strip("\"'")) for key, _, given in pairs]


def split_outside_brackets(words: str) -> list[str]:
    """Splits a text at spaces and commas that are in no brackets, and before a `key=`: "betas=0.9,0.99 eps=1e-8"."""
    parts: list[str] = []
    depth = 0
    for piece in words.replace(",", " , ").split(" "):
        if depth == 0 and "=" in piece:
            parts.append(piece)
        elif parts and piece:
            parts[-1] += piece
        elif piece not in ("", ","):
            parts.append(piece)
        depth += piece.count("(") + piece.count("[") - piece.count(")") - piece.count("]")
    return [part.strip(", ") for part in parts]
