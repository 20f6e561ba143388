"""Samples during training: prompts with control pictures, and files of prompts with options behind them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixtune.inputs.reading import MEBIBYTE, read_bounded
from pixtune.migration import conversions as to
from pixtune.migration.reading import find_second
from pixtune.migration.rules import Look, Lost, Outcome, WrongValue, only_if

PROMPT_KEYS = ("sample.prompts", "sample.samples", "sample_prompts", "validation_prompt", "samples")
OFF_KEYS = ("train.disable_sampling", "validation_disable")
OPTION = re.compile(r"\s--([a-z]\w*)\s+")
SAME_OPTION = {"seed": "d", "cfg": "l", "steps": "s", "ctrl_img": "ci", "network_multiplier": "m"}
"""Longer names of options, as ai-toolkit has them, with kohya's."""
NUMBERED = {"w": "samples.width", "h": "samples.height", "s": "samples.num_steps", "d": "samples.seeds"}


def asks_for_samples(look: Look) -> bool:
    """Returns whether a config asks for samples."""
    return any(look.written.get(key) for key in PROMPT_KEYS) and not any(
        look.written.get(key) is True for key in OFF_KEYS
    )


only_with_prompts = only_if(asks_for_samples, "no samples are asked for")
"""Makes conversions of settings of samples."""


def prompts(value: Any, look: Look) -> Any:
    """Returns prompts, from texts or from {prompt, ctrl_img, ctrl_img_1, ...} each."""
    if not asks_for_samples(look):
        return Lost("no samples are asked for", False)
    items = value if isinstance(value, list) else [value]
    trigger = look.get("trigger_word")
    prompts, controls = [], []
    for item in items:
        prompt = item.get("prompt") if isinstance(item, Mapping) else item
        if not isinstance(prompt, str | int | float):
            raise WrongValue("a prompt is a text")
        prompts.append(str(prompt).replace("[trigger]", str(trigger)) if trigger else str(prompt))
        names = [key for key in item if re.fullmatch(r"ctrl_img(_\d)?", str(key))] if isinstance(item, Mapping) else []
        controls.append([str(item[key]) for key in sorted(names) if item[key]])
    values: dict[str, Any] = {"samples.prompts": prompts}
    if all(controls) and look.model.edits:
        values["samples.controls"] = controls
        return Outcome(values)
    if look.model.edits:
        return Outcome({}, (Lost("an edit model needs control pictures of each prompt: write samples", False),))
    return Outcome(values)


def prompts_with_options(value: Any, look: Look) -> Any:
    """Returns prompts, of which texts may have options behind them: `make it blue --ctrl_img cup.png --seed 7`."""
    items = value if isinstance(value, list) else [value]
    with_options = any(isinstance(item, str) and OPTION.search(f"{item} ") for item in items)
    if not with_options or not asks_for_samples(look) or not all(isinstance(item, str) for item in items):
        return prompts(value, look)
    trigger = look.get("trigger_word")
    return _prompts_of([item.replace("[trigger]", str(trigger)) if trigger else item for item in items], look)


def guidance(value: Any, look: Look) -> float:
    """Returns a scale of guidance, of which 1 and less is none."""
    return max(1.0, to.real(value))


def file_of_prompts(value: Any, look: Look) -> Any:
    """Returns what a file says of prompts with options behind them, `a cat --w 768 --h 512 --d 1 --s 20 --n ugly`."""
    path = Path(to.text(value)).expanduser()
    found = find_second(str(path), look.folder)
    if found is None:
        return Lost("the file of prompts is not here: write samples.prompts, or samples.prompts_file", False, True)
    if found.suffix.casefold() != ".txt":
        return Lost("a file of prompts in TOML or JSON: write samples.prompts", False, True)
    try:
        text = read_bounded(found, MEBIBYTE).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        return Lost(f"the file of prompts cannot be read ({error}): write samples.prompts", False, True)
    lines = (line.strip() for line in text.split("\n"))
    return _prompts_of([line for line in lines if line and not line.startswith("#")], look)


def _prompts_of(lines: Sequence[str], look: Look) -> Any:
    """Returns what prompts with options behind them say."""
    prompts, controls = [], []
    options: dict[str, list[str]] = {}
    for line in lines[:1000]:
        prompt, *rest = OPTION.split(f"{line} ")
        prompts.append(prompt.strip())
        names = (SAME_OPTION.get(name, name) for name in rest[::2])
        given = dict(zip(names, (each.strip() for each in rest[1::2]), strict=False))
        controls.append([given.pop("ci")] if "ci" in given else [])
        for key, option in given.items():
            options.setdefault(key, []).append(option)
    if not prompts:
        return Lost("there is no prompt in it", False)
    if look.model.edits and not all(controls):
        return Lost("an edit model needs control pictures of each prompt: write samples", False)
    values: dict[str, Any] = {"samples.prompts": prompts}
    if look.model.edits:
        values["samples.controls"] = controls
    for key, ours in NUMBERED.items():
        if key in options:
            number = to.whole(options[key][0])
            values[ours] = [number] if key == "d" else number
    scale = options.get("g" if look.model.guided else "l") or options.get("l") or options.get("g")
    if scale:
        values["samples.guidance_scale"] = max(1.0, to.real(scale[0]))
    if "m" in options:
        values["samples.strengths"] = [to.real(options["m"][0])]
    if "n" in options:
        values["samples.negative_prompt"] = options["n"][0]
    differ = [key for key, given in options.items() if len(set(given)) > 1]
    why = "prompts have different sizes, seeds or scales, and the first one's are taken for all"
    return Outcome(values, (Lost(why, False),) if differ else ())
