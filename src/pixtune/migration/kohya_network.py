"""`network_module` and `network_args` of kohya's trainers: the kind of adapter, its layers and their ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pixtune.migration import adapters
from pixtune.migration import conversions as to
from pixtune.migration import optimizers as optim
from pixtune.migration.rules import Convert, Look, Lost, Outcome, WrongValue

KEYS = f"{adapters.KEYS} adapter.rslora lora_targets adapter.rank_pattern"
"""Keys here that arguments may lead to."""
Layers = Callable[[dict[str, str]], dict[str, Any]]
"""From arguments, of which it takes those that say which layers are adapted, to our keys."""

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"
GROUPS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "img_attn_dim": (DOUBLE, ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")),
    "txt_attn_dim": (DOUBLE, ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")),
    "img_mlp_dim": (DOUBLE, ("ff.net.*",)),
    "txt_mlp_dim": (DOUBLE, ("ff_context.net.*",)),
    "img_mod_dim": (DOUBLE, ("norm1.linear",)),
    "txt_mod_dim": (DOUBLE, ("norm1_context.linear",)),
    "single_dim": (SINGLE, ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")),
    "single_mod_dim": (SINGLE, ("norm.linear",)),
}
"""Ranks of sd-scripts, each with the layers of FLUX that have it: their list of blocks, and endings in a block."""
INDICES = {DOUBLE: "train_double_block_indices", SINGLE: "train_single_block_indices"}
MOST_BLOCKS = 1000


def module(value: Any, look: Look) -> Any:
    """Returns the kind of adapter."""
    name = to.text(value).rpartition(".")[2]
    if "lycoris" in to.text(value):
        algorithm = dict(optim.pairs(_words(look.peek("network_args")))).get("algo", "lora")
        found = adapters.kind(str(algorithm))
    else:
        found = adapters.kind(name if name in ("lokr", "loha", "oft") else "lora")
    if found.values.get("adapter.kind") == "lokr":
        low = adapters.low_rank(to.number(look.peek("network_dim", 4)))
        return Outcome({**found.values, "adapter.lokr_low_rank": low})
    return found


def arguments(layers: Layers) -> Convert:
    """Makes a conversion of `network_args`."""

    def convert(value: Any, look: Look) -> Any:
        if not (words := _words(value)):
            return Lost("none, as here", False)
        given = {key: str(word) for key, word in optim.pairs(words) if key != "algo"}
        values: dict[str, Any] = {}
        for key, (ours, meaning) in _SWITCHES.items():
            if key in given and to.truth(given.pop(key)):
                values[ours] = meaning
        if "factor" in given:
            values["adapter.lokr_factor"] = adapters.factor(given.pop("factor"), look)
        values |= layers(given)
        if not given:
            return Outcome(values) if values else Lost("see network_module, or as here", False)
        rest = ", ".join(f"{key}={word}" for key, word in given.items())
        why = "layers and ranks are lora_targets and adapter.rank_pattern here, by patterns with *, and have one rate"
        return Outcome(values, (Lost(f"{rest[:200]}: {why}"),))

    return convert


_SWITCHES: Mapping[str, tuple[str, Any]] = {
    "dora_wd": ("adapter.kind", "dora"), "use_dora": ("adapter.kind", "dora"),
    "use_rslora": ("adapter.rslora", True),
    "full_matrix": ("adapter.lokr_low_rank", "none"), "decompose_both": ("adapter.lokr_low_rank", "both"),
}  # fmt: skip


def of_flux(given: dict[str, str]) -> dict[str, Any]:
    """Takes what says which of FLUX's layers are adapted, and at which ranks; a rank of 0 stands for none."""
    given.pop("split_qkv", None)  # each of q, k and v has its own here
    ranks = {name: to.whole(given.pop(name)) for name in GROUPS if name in given}
    if any(rank < 0 for rank in ranks.values()):
        raise WrongValue("a rank below 0 is none")
    only = given.pop("train_blocks", "all").casefold()
    if only not in ("all", "double", "single"):
        raise WrongValue(f"train_blocks is {only[:40]!r}: all, double or single is expected")
    blocks = {name: _blocks(name, given.pop(key, "all")) for name, key in INDICES.items()}
    if only != "all":
        blocks[SINGLE if only == "double" else DOUBLE] = ()
    targets: list[str] = []
    for name, prefixes in blocks.items():
        groups = {group: endings for group, (of, endings) in GROUPS.items() if of == name}
        some = [ending for group, endings in groups.items() if ranks.get(group) != 0 for ending in endings]
        whole = not any(ranks.get(group) == 0 for group in groups)
        for prefix in prefixes:
            targets += (
                [f"{prefix}.*" if prefix != f"{name}.*" else prefix] if whole else [f"{prefix}.{e}" for e in some]
            )
    if not targets:
        raise WrongValue("its arguments leave no layer")
    found: dict[str, Any] = {}
    if targets != [f"{DOUBLE}.*", f"{SINGLE}.*"]:
        found["lora_targets"] = targets
    pattern = {
        f"{of}.*.{ending}": rank
        for group, rank in ranks.items()
        for of, endings in [GROUPS[group]]
        for ending in endings
        if rank > 0 and blocks[of]
    }
    return found | ({"adapter.rank_pattern": pattern} if pattern else {})


def _blocks(name: str, word: str) -> tuple[str, ...]:
    """Returns the beginnings of the paths of blocks: all, none, or 0,1,4-7."""
    if word.strip().casefold() == "all":
        return (f"{name}.*",)
    if word.strip().casefold() == "none":
        return ()
    numbers: dict[int, None] = {}
    for part in word.strip("[] ").split(","):
        first, _, last = part.partition("-")
        low, high = to.whole(first), to.whole(last or first)
        if not 0 <= low <= high < MOST_BLOCKS:
            raise WrongValue(f"{part[:40]!r} is no range of blocks")
        numbers |= dict.fromkeys(range(low, high + 1))
    return tuple(f"{name}.{number}" for number in numbers)


def of_musubi_tuner(given: dict[str, str]) -> dict[str, Any]:
    """Takes whether the layers of the modulation are adapted, which are left out where nothing says so."""
    if "exclude_mod" not in given:
        return {}
    return {} if to.truth(given.pop("exclude_mod")) else {"lora_targets": ["all_linear"]}


def _words(value: Any) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [str(word) for word in items if word not in (True, None) and str(word).strip()]
