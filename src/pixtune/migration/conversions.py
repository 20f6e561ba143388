"""Conversions of single values, shared by the tables of all trainers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pixtune.migration.models import is_hub_name_or_folder
from pixtune.migration.rules import Convert, Look, Lost, Outcome, WrongValue, is_off

# ---- plain values


def number(value: Any, look: Look | None = None) -> float | int:
    """Returns a number, from text as well: YAML 1.1 reads 1e-4 as text, and a command line has only text."""
    if isinstance(value, str):
        try:
            value = float(value.strip().rstrip("."))
        except ValueError:
            raise WrongValue("a number is needed") from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise WrongValue("a number is needed")
    return int(value) if float(value).is_integer() and abs(value) < 1e15 else value


def real(value: Any, look: Look | None = None) -> float:
    """Returns a number with a decimal point, as keys here want whose values may be fractions."""
    return float(number(value))


def whole(value: Any, look: Look | None = None) -> int:
    found = number(value)
    if not isinstance(found, int):
        raise WrongValue("a whole number is needed")
    return found


def count(value: Any) -> int:
    """Returns a whole number of at least 1."""
    found = whole(value)
    if found < 1:
        raise WrongValue("a number of at least 1 is needed")
    return found


def share(value: Any) -> float:
    """Returns a number from 0 to 1."""
    found = real(value)
    if not 0 <= found <= 1:
        raise WrongValue("a number from 0 to 1 is needed")
    return found


def text(value: Any, look: Look | None = None) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise WrongValue("a text is needed")
    return str(value)


def truth(value: Any, look: Look | None = None) -> bool:
    if isinstance(value, str) and value.strip().casefold() in ("true", "1", "yes", "on"):
        return True
    if isinstance(value, str) and value.strip().casefold() in ("false", "0", "no", "off", ""):
        return False
    if not isinstance(value, bool) and value not in (0, 1):
        raise WrongValue("true or false is needed")
    return bool(value)


def texts(value: Any, look: Look | None = None) -> list[str]:
    """Returns a list of texts; a single text is one of its own."""
    items = value if isinstance(value, list | tuple) else [value]
    return [text(item) for item in items]


def one_or_several(value: Any, look: Look | None = None) -> str | list[str]:
    """Returns a path, or a list of them where there are several."""
    found = [each for each in texts(value) if each]
    if not found:
        raise WrongValue("a path is needed")
    return found[0] if len(found) == 1 else found


def extension(value: Any, look: Look | None = None) -> str:
    """Returns an extension without its dot."""
    return text(value).lstrip(".")


def at_least_one(value: Any, look: Look | None = None) -> Any:
    """Returns a count; 0 and fewer mean no limit, or never."""
    found = whole(value)
    return found if found > 0 else Lost("0 stands for none, as leaving the key out does here", False)


def truth_or(why_not: str) -> Convert:
    """Makes a conversion of a switch that only its being on is worth a line."""

    def convert(value: Any, look: Look) -> Any:
        return True if truth(value) else Lost(why_not, False)

    return convert


def chosen(table: Mapping[str, Any], otherwise: Any = None) -> Convert:
    """Makes a conversion by a table of words, in any letter case."""
    by_word = {word.casefold(): meaning for word, meaning in table.items()}

    def convert(value: Any, look: Look) -> Any:
        word = text(value).casefold()
        if word in by_word:
            return by_word[word]
        if otherwise is None:
            raise WrongValue(f"one of {', '.join(table)} is expected")
        return otherwise

    return convert


def plain_name(name: Any) -> str:
    """Returns a name of an optimizer or a number format in small letters, without its module and marks."""
    last = text(name).rpartition(".")[2]
    return "".join(mark for mark in last.casefold() if mark.isalnum())


def lora_file(value: Any, look: Look) -> Any:
    """Returns `init_lora`: the file that a LoRA begins with."""
    name = text(value)
    if not name:
        return Lost("none, as here", False)
    if name.casefold().endswith((".safetensors", ".sft")):
        return Outcome({"init_lora": name})
    return Lost("write the LoRA's .safetensors file as init_lora", to_fill_in=True)


def transformer(value: Any, look: Look) -> Any:
    """Returns `model_parts.transformer`: a transformer's file, beside which the other parts are those of the hub."""
    name = value if isinstance(value, str) else ""
    if not name:
        return Lost("none, as here", False)
    if name.casefold().endswith((".safetensors", ".gguf")):
        return Outcome({"model_parts.transformer": name})
    return Lost(f"the base is {look.model.name} from the hub: write model_parts.transformer if that is another one")


def base(value: Any, look: Look) -> Any:
    """Returns a base that is one file as `transformer` does; a folder or hub name is the model itself."""
    return Outcome() if is_hub_name_or_folder(value) else transformer(value, look)


# ---- sizes


def side(value: Any, look: Look | None = None) -> int:
    """Returns the side of the square of a picture's area: 1024, "1024", "1024x1024", [1216, 832]."""
    if isinstance(value, str):
        parts = value.casefold().replace("x", ",").replace("*", ",").split(",")
        value = [number(part) for part in parts if part.strip()]
    if isinstance(value, list | tuple) and 1 <= len(value) <= 3:  # a third one is a number of frames
        sides = [float(number(each)) for each in value[:2]]
        return round(math.sqrt(sides[0] * sides[-1]))
    return round(number(value))


def sides(value: Any, look: Look | None = None) -> int | list[int]:
    """Returns the sides of one or several areas: 512, [512, 768], [[1280, 720]]; "512,768" are several."""
    if isinstance(value, str) and "x" not in value.casefold():
        value = [part for part in value.split(",") if part.strip()]
    items = value if isinstance(value, list | tuple) else [value]
    found = list(dict.fromkeys(side(item) for item in items))
    if not found:
        raise WrongValue("a size in pixels is needed")
    return found[0] if len(found) == 1 else found


def width_and_height(value: Any, look: Look | None = None) -> Outcome:
    """Returns the size of samples: 1024, "1024x768", or several of them with commas, "512x512,1024x768"."""
    if not isinstance(value, str):
        return Outcome({"samples.width": whole(value), "samples.height": whole(value)})
    sizes = []
    for part in value.split(","):
        width, _, height = part.casefold().strip().partition("x")
        sizes.append([whole(width), whole(height or width)])
    if len(sizes) == 1:
        return Outcome({"samples.width": sizes[0][0], "samples.height": sizes[0][1]})
    return Outcome({"samples.sizes": sizes})


def in_buckets(shape: str) -> Convert:
    """Makes a conversion of the switch of buckets, without which all pictures are cropped to one shape."""

    def convert(value: Any, look: Look) -> Lost:
        if truth(value):
            return Lost("pictures are put into buckets of their own ratio here always", False)
        return Lost(f"all pictures are cropped to {shape} there; here each is in a bucket of its own ratio")

    return convert


# ---- times


def every_epochs(ours: str) -> Convert:
    """Makes a conversion of a number of epochs between two events, to steps."""

    def convert(value: Any, look: Look) -> Any:
        epochs = float(number(value))
        if epochs <= 0:
            return Lost("never, by this key", False)
        steps = look.steps_of(epochs)
        if steps is None:
            why = (
                f"it counts epochs and {ours} counts steps: write PICTURES x REPEATS / BATCH x {epochs:g}; the folder "
                "of pictures is not on this machine"
            )
            return Lost(why, changes_result=False, to_fill_in=True)
        return Outcome({ours: steps})

    return convert


def warm_up(schedule_key: str = "", ignored_by: Sequence[str] = ()) -> Convert:
    """Makes a conversion of warm-up: a number of steps, or a share of all steps below 1.

    Args:
        schedule_key: key there of the schedule.
        ignored_by: schedules there that have no warm-up whatever this key says.
    """

    def convert(value: Any, look: Look) -> Any:
        if isinstance(value, str) and value.strip().endswith("%"):
            amount = float(number(value.strip()[:-1])) / 100
        else:
            amount = float(number(value))
        schedule = str(look.peek(schedule_key, "")).casefold()
        if amount and schedule in ignored_by:
            return Lost(f"the schedule {schedule} has no warm-up there, whatever this key says", False)
        if 0 < amount < 1:
            return Outcome({"lr_warmup_share": amount})
        return round(amount)

    return convert


# ---- number formats and memory


def precision(value: Any, look: Look) -> Any:
    """Returns the number format of activations; fp16 has none here."""
    name = plain_name(value)
    if name in ("bf16", "bfloat16"):
        return "bf16"
    if name in ("no", "fp32", "float32", "float"):
        return "no"
    if name in ("fp16", "float16", "fp8"):
        return Outcome({"mixed_precision": "bf16"}, (Lost(f"there is no {text(value)} here; bf16 takes its place"),))
    raise WrongValue("no, fp16 or bf16 is expected")


def quantization(value: Any, look: Look) -> Any:
    """Returns whether the base is quantized to 8 bits, from the name of a number format; the planner has the rest."""
    name = plain_name(value)
    if name in ("nochange", "none", "bf16", "bfloat16", "fp32", "float32", "fp16", "float16", "tfloat32"):
        return Lost("16 bits are what the planner takes where they fit; quantize: false demands them", False)
    if any(mark in name for mark in ("8bit", "int8", "fp8", "float8", "qfloat8", "qint8", "f8")):
        return Outcome({"quantize": True})
    if any(mark in name for mark in ("4", "3", "2", "6", "5")):
        return Lost("the planner takes 8 or 4 bits by the memory there is", True)
    raise WrongValue("this number format is not known")


def tracker(value: Any, look: Look) -> Any:
    """Returns the tracker: TensorBoard or Weights & Biases."""
    names = [part.strip().casefold() for part in text(value).split(",")]
    for known in ("wandb", "tensorboard"):
        if known in names:
            return known
    if "all" in names:
        return "tensorboard"
    if names == ["none"] or names == [""]:
        return Lost("no tracker, as here", False)
    return Lost("there is no such tracker; metrics.jsonl is always written", False)


# ---- noise levels


def shift_of(factor: Any) -> float | str:
    """Returns `objective.shift` for a factor of sigmas, of which it is the logarithm; "none" for 1."""
    found = float(number(factor))
    if found <= 0:
        raise WrongValue("a number above 0 is needed")
    return "none" if found == 1 else round(math.log(found), 6)


def levels(sigma_distribution: str, shift: float | str, **others: Any) -> Outcome:
    """Makes the outcome of a way of drawing noise levels."""
    values = {"objective.sigma_distribution": sigma_distribution, "objective.shift": shift}
    return Outcome(values | {f"objective.{name}": value for name, value in others.items()})


def sd3_density(look: Look, scheme_key: str = "weighting_scheme", flipped: bool = True) -> dict[str, Any]:
    """Returns the distribution that diffusers' `weighting_scheme` names, and nothing of the shift.

    Its densities are over the place in the schedule, which counts from noise to clean: their mean has the other sign.
    """
    scheme = str(look.get(scheme_key, "none"))
    if scheme == "logit_normal":
        mean, std = float(number(look.get("logit_mean", 0.0))), float(number(look.get("logit_std", 1.0)))
        mean = -mean if flipped and mean else mean
        return {"sigma_distribution": "logit_normal", "logit_mean": mean, "logit_std": std}
    if scheme == "mode":
        return {"sigma_distribution": "mode", "mode_scale": float(number(look.get("mode_scale", 1.29)))}
    return {"sigma_distribution": "uniform"}


def sd3_weighting(value: Any, look: Look) -> Any:
    """Returns the weight of losses that diffusers' `weighting_scheme` names; its other words name distributions."""
    name = text(value).casefold()
    if name in ("sigma_sqrt", "cosmap"):
        return name
    if name in ("none", "logit_normal", "mode", "uniform"):
        return Lost("a distribution of noise levels, see objective.sigma_distribution", False)
    raise WrongValue("sigma_sqrt, logit_normal, mode, cosmap or none is expected")


def sigma_of_timestep(value: Any, look: Look) -> float:
    """Returns a noise level from a timestep that counts to 1000."""
    return min(max(round(float(number(value)) / 1000, 6), 0.0), 1.0)


def unless_off(why: str) -> Convert:
    """Makes a conversion of what changes the result where it is on."""

    def convert(value: Any, look: Look) -> Lost:
        return Lost("off, as here", False) if is_off(value) else Lost(why)

    return convert
