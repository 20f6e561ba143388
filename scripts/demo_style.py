"""Writes `assets/demo-style/`: pictures of a drawing style that the small base model has never seen.

    python scripts/demo_style.py

`train/` is for the LoRA. `held_out/` has other names of the same kinds in the same style, to measure whether the style
transfers. Every name is one that the base model knows in two of its own styles. `prior/` has drawings of the base's own
sets, by which a LoRA leaves those styles as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from emoji_pictures import BASE_SETS, PART_SETS, read_icons, read_named_icons, save_pair

STYLE_SET = "twemoji"
OUT_DIR = Path(__file__).resolve().parent.parent / "assets" / "demo-style"
SIZE_PIXELS = 128
PRIOR_EVERY = 3
"""Of each of the base's sets, one of so many drawings of the names to train on is a regularization picture."""

TRAIN_NAMES = """
    grinning face; smiling face with sunglasses; crying face; thinking face; face with tongue; angry face;
    sleeping face; smiling face with hearts; cowboy hat face; alien; robot; smiling cat with heart eyes;
    dog face; panda; lion; pig face; owl; whale; turtle; butterfly; honeybee; elephant; rooster; octopus;
    red apple; pizza; hamburger; strawberry; carrot; doughnut; birthday cake; watermelon; hot beverage; avocado;
    soccer ball; guitar; key; light bulb; camera; books; umbrella; wrapped gift;
    rocket; police car; house; sailboat; sunflower; red heart
"""
HELD_OUT_NAMES = """
    winking face; face with tears of joy; nerd face; worried face; face with monocle; smiling face with heart eyes;
    star struck; yawning face; smiling face with halo; ghost; jack o lantern; crying cat;
    cat face; bear; tiger face; cow face; penguin; dolphin; frog; lady beetle; snail; fox; duck; crab;
    banana; taco; french fries; cherries; tomato; cookie; pancakes; pineapple; beer mug; grapes;
    basketball; violin; hammer; candle; television; pencil; balloon; trophy;
    airplane; taxi; castle; bicycle; tulip; blue heart
"""


def parse_names(text: str) -> list[str]:
    """Splits names at semicolons."""
    return [" ".join(name.split()) for name in text.split(";")]


def demo_names() -> tuple[list[str], list[str]]:
    """Returns the names to train on and the names held out.

    Raises:
        ValueError: a name is used twice, or is missing from one of the three sets.
    """
    train, held_out = parse_names(TRAIN_NAMES), parse_names(HELD_OUT_NAMES)
    known = set.intersection(*({icon.name for icon in read_icons(name)} for name in (*PART_SETS, STYLE_SET)))
    missing = [name for name in (*train, *held_out) if name not in known]
    if missing or len({*train, *held_out}) < len(train) + len(held_out):
        raise ValueError(f"names must be different and in all three sets; missing: {missing}")
    return train, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT_DIR)
    arguments = parser.parse_args()
    for folder, names in zip(("train", "held_out"), demo_names(), strict=True):
        for icon in read_named_icons(STYLE_SET, names):
            save_pair(arguments.out / folder, icon, SIZE_PIXELS)
        print(f"{len(names)} pictures in {arguments.out / folder}")
    for number, set_name in enumerate(BASE_SETS):
        icons = {icon.name: icon for icon in read_icons(set_name)}
        known = [icons[name] for name in demo_names()[0] if name in icons]
        for icon in known[number % PRIOR_EVERY :: PRIOR_EVERY]:
            save_pair(arguments.out / "prior" / set_name, icon, SIZE_PIXELS)


if __name__ == "__main__":
    main()
