"""Samples during training: prompts with control pictures, and files of prompts with options behind them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixtune.inputs.reading import MEBIBYTE, read_bounded
from pixtune.migration import conversions as to
from pixtune.migration.reading import find_second
from pixtune.migration.rules import Look, Lost, Outcome, WrongValue, only_if

MOST_PROMPTS = 1000
OF_A_PROMPT = ("w", "h", "d", "n")
"""Options that each prompt of `samples.prompts_file` may have of its own, beside controls."""
SCALES = ("samples.guidance_scale", "samples.strengths")
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
    """Returns what prompts with options behind them say; where they differ in these, as rows of a file of prompts."""
    found = [_with_options(line) for line in lines[:MOST_PROMPTS]]
    if not found:
        return Lost("there is no prompt in it", False)
    if look.model.edits and not all("ci" in given for _, given in found):
        return Lost("an edit model needs control pictures of each prompt: write samples", False)
    own = {key: {given.get(key) for _, given in found} for key in OF_A_PROMPT}
    in_file = look.prompts_file and any(len(values) > 1 for values in own.values())
    values = _for_all(found, look)
    if in_file:
        look.prompts.extend(_row(prompt, given, look) for prompt, given in found)
        values = {key: value for key, value in values.items() if key in ("samples.num_steps", *SCALES)}
        values["samples.prompts_file"] = look.prompts_file
    counted = {key for _, given in found for key in given if key != "ci" and not (in_file and key in OF_A_PROMPT)}
    differ = [key for key in sorted(counted) if len({given[key] for _, given in found if key in given}) > 1]
    lost = []
    if differ:
        lost.append(Lost(f"prompts differ in --{', --'.join(differ)}, and the first one's is taken for all", False))
    if in_file and any(("w" in given) != ("h" in given) for _, given in found):
        lost.append(Lost("a prompt has one of --w and --h alone, and gets the usual size here", False))
    return Outcome(values, tuple(lost))


def _with_options(line: str) -> tuple[str, dict[str, str]]:
    """Returns a prompt, and the options behind it by kohya's names."""
    prompt, *rest = OPTION.split(f"{line} ")
    names = (SAME_OPTION.get(name, name) for name in rest[::2])
    return prompt.strip(), dict(zip(names, (each.strip() for each in rest[1::2]), strict=False))


def _for_all(found: Sequence[tuple[str, Mapping[str, str]]], look: Look) -> dict[str, Any]:
    """Returns prompts, with the options of the first that has each for all."""
    options: dict[str, str] = {}
    for _, given in found:
        options = {**given, **options}
    values: dict[str, Any] = {"samples.prompts": [prompt for prompt, _ in found]}
    if look.model.edits:
        values["samples.controls"] = [[given["ci"]] for _, given in found]
    for key, ours in NUMBERED.items():
        if key in options:
            number = to.whole(options[key])
            values[ours] = [number] if key == "d" else number
    scale = options.get("g" if look.model.guided else "l") or options.get("l") or options.get("g")
    if scale:
        values["samples.guidance_scale"] = max(1.0, to.real(scale))
    if "m" in options:
        values["samples.strengths"] = [to.real(options["m"])]
    if "n" in options:
        values["samples.negative_prompt"] = options["n"]
    return values


def _row(prompt: str, given: Mapping[str, str], look: Look) -> dict[str, Any]:
    """Returns a prompt with its options as a row of `samples.prompts_file`."""
    row: dict[str, Any] = {"prompt": prompt}
    if "w" in given and "h" in given:
        row |= {"width": to.whole(given["w"]), "height": to.whole(given["h"])}
    if "d" in given:
        row["seed"] = to.whole(given["d"])
    if "n" in given:
        row["negative"] = given["n"]
    if look.model.edits:
        row["control"] = os.path.abspath(given["ci"])  # the file's are relative to its own folder
    return row
