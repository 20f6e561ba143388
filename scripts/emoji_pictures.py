"""Emoji of ten drawing styles as captioned pictures: the data behind `assets/`.

The drawings come from Iconify's npm packages, which hold each icon's name and the inside of its SVG. They are fetched
with `npm pack` into a cache folder that git ignores and rendered with resvg over white. Nothing is unpacked on disk.

    python scripts/emoji_pictures.py --set twemoji --out /tmp/twemoji --size 128
"""

from __future__ import annotations

import argparse
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

CACHE_DIR = Path(__file__).resolve().parent.parent / ".cache" / "icons"

SKIN_TONES = ("medium light", "medium dark", "light", "medium", "dark")
"""Skin tones, two-word tones first, so that a search for them never stops at half of one."""
_NUMBERED_TONES = {"1": "light", "2": "medium light", "3": "medium", "4": "medium dark", "5": "dark"}
_TONE = "(?:" + "|".join(SKIN_TONES) + ")"
_GENDER = re.compile(r"\b(?:man|men|woman|women|person|people|boy|girl)\b")


@dataclass(frozen=True)
class IconSet:
    """One npm package of drawings."""

    package: str
    style: str
    """Words that end every caption of this set."""
    licence: str


ICON_SETS = {
    "noto": IconSet("@iconify-json/noto", "noto style", "Apache-2.0"),
    "fluent": IconSet("@iconify-json/fluent-emoji-flat", "fluent flat style", "MIT"),
    "noto-v1": IconSet("@iconify-json/noto-v1", "old noto style", "Apache-2.0"),
    "fluent-3d": IconSet("@iconify-json/fluent-emoji", "fluent color style", "MIT"),
    "emojione": IconSet("@iconify-json/emojione", "emojione style", "CC-BY-4.0"),
    "fxemoji": IconSet("@iconify-json/fxemoji", "fxemoji style", "Apache-2.0"),
    "streamline": IconSet("@iconify-json/streamline-emojis", "streamline style", "CC-BY-4.0"),
    "high-contrast": IconSet("@iconify-json/fluent-emoji-high-contrast", "high contrast style", "MIT"),
    "monotone": IconSet("@iconify-json/emojione-monotone", "monotone style", "CC-BY-4.0"),
    "twemoji": IconSet("@iconify-json/twemoji", "twemoji style", "CC-BY-4.0"),
}
PART_SETS = ("noto", "fluent")
"""Sets whose captions the tokenizers, and whose drawings the autoencoders, of the small models were made from."""
BASE_SETS = tuple(name for name in ICON_SETS if name != "twemoji")
"""Sets that the small transformers are trained on. Twemoji is kept from them, so that a LoRA can learn it."""
NAMING_SETS = ("noto", "fluent", "twemoji")
"""Sets by whose names the drawings of the others are called."""
OTHER_NAMES = {
    "fxemoji": {
        "winking": "winking face", "worried": "worried face", "crying": "crying face", "angry": "angry face",
        "sleeping": "sleeping face", "tongueout": "face with tongue", "grintears": "face with tears of joy",
        "hearteyes": "smiling face with heart eyes", "halo": "smiling face with halo",
        "darksunglasses": "smiling face with sunglasses", "sliceofpizza": "pizza", "heartblue": "blue heart",
        "heartgreen": "green heart", "heartyellow": "yellow heart", "heartpurple": "purple heart",
        "present": "wrapped gift", "lowerleftpencil": "pencil", "spurtingwhale": "spouting whale",
        "aubergine": "eggplant", "bunny": "rabbit face", "bunnyside": "rabbit", "catside": "cat", "dogside": "dog",
        "tigerside": "tiger", "pigside": "pig", "mouseside": "mouse", "gem": "gem stone", "lock": "locked",
        "openlock": "unlocked", "smirk": "smirking face", "neutral": "neutral face", "flushed": "flushed face",
        "astonished": "astonished face", "confused": "confused face", "relieved": "relieved face",
        "pensive": "pensive face", "weary": "weary face", "hushed": "hushed face", "unamused": "unamused face",
        "europeancastle": "castle", "wolfface": "wolf", "chilipepper": "hot pepper", "earofmaize": "ear of corn",
    },
    "streamline": {"fox face": "fox", "wolf face": "wolf", "amazed face": "astonished face"},
}  # fmt: skip
"""Names of a set's own, and what the others call the same thing."""


@dataclass(frozen=True)
class Icon:
    """One drawing."""

    name: str
    """Plain words, the same in every set: "artist, dark skin tone"."""
    style: str
    svg: str

    @property
    def caption(self) -> str:
        return f"{self.name}, {self.style}"

    @property
    def group(self) -> str:
        """Style and name without skin tones and gender: variants that count as the same picture when compared."""
        plain = re.sub(rf",? ?\b{_TONE} skin tone\b", "", self.name)
        plain = " ".join(_GENDER.sub(" ", plain).split()).strip(" ,")
        return f"{plain or 'person'}, {self.style}"


def fetch_package(package: str, cache_dir: Path = CACHE_DIR) -> Path:
    """Fetches a package's archive, once."""
    stem = package.removeprefix("@").replace("/", "-")
    found = sorted(cache_dir.glob(f"{stem}-[0-9]*.tgz"))
    if found:
        return found[-1]
    cache_dir.mkdir(parents=True, exist_ok=True)
    subprocess.run(["npm", "pack", "--silent", package], cwd=cache_dir, check=True, stdout=subprocess.DEVNULL)
    return sorted(cache_dir.glob(f"{stem}-[0-9]*.tgz"))[-1]


@cache
def _package(set_name: str, cache_dir: Path) -> dict[str, Any]:
    """Reads the icons of a set's package."""
    with tarfile.open(fetch_package(ICON_SETS[set_name].package, cache_dir)) as archive:
        stream = archive.extractfile("package/icons.json")
        assert stream is not None
        return dict(json.load(stream))


@cache
def _names_by_letters(cache_dir: Path) -> dict[str, str]:
    """Returns the names of the naming sets by their letters alone: "brokenheart" -> "broken heart"."""
    names = [icon.name for set_name in NAMING_SETS for icon in read_icons(set_name, cache_dir)]
    return {_letters(name): name for name in reversed(names)}


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def read_icons(set_name: str, cache_dir: Path = CACHE_DIR) -> list[Icon]:
    """Reads all drawings of a set, sorted by name.

    A set that has its own way of naming gets the names of `NAMING_SETS`, also by a package's aliases. Left out: other
    aliases (another name for the same icon), icons that the package marks as hidden (superseded names), and icons whose
    drawing an earlier name already has; and in sets named after others, drawings that the others have no name for.
    """
    icon_set, data = ICON_SETS[set_name], _package(set_name, cache_dir)
    aliases: dict[str, list[str]] = {}
    for alias, entry in data.get("aliases", {}).items():
        aliases.setdefault(entry["parent"], []).append(alias)
    icons: list[Icon] = []
    seen_names: set[str] = set()
    seen_bodies: set[str] = set()
    for key, entry in sorted(data["icons"].items()):
        name: str | None = _plain_name(key, data["icons"])
        if set_name not in NAMING_SETS:
            own = [name or "", *(alias.replace("-", " ") for alias in aliases.get(key, []))]
            name = _common_name(set_name, own, cache_dir)
        if name is None or entry.get("hidden") or entry["body"] in seen_bodies or name in seen_names:
            continue
        seen_names.add(name)
        seen_bodies.add(entry["body"])
        icons.append(Icon(name, icon_set.style, _svg(entry, data)))
    return icons


def _common_name(set_name: str, own_names: Sequence[str], cache_dir: Path) -> str | None:
    """Finds what the naming sets call a drawing of these names; None where they have no name for it."""
    known = _names_by_letters(cache_dir)
    for own in own_names:
        plain = re.sub(r" \d$", "", own)
        plain = OTHER_NAMES.get(set_name, {}).get(plain, plain)
        if _letters(plain) in known:
            return known[_letters(plain)]
    return None


def read_base_icons(set_names: Sequence[str] = BASE_SETS, cache_dir: Path = CACHE_DIR) -> list[Icon]:
    """Reads the drawings that the small base models are trained on, or those of the given sets."""
    return [icon for set_name in set_names for icon in read_icons(set_name, cache_dir)]


def read_named_icons(set_name: str, names: Sequence[str]) -> list[Icon]:
    """Reads the drawings of the given names, in their order.

    Raises:
        KeyError: a name is not in the set.
    """
    icons = {icon.name: icon for icon in read_icons(set_name)}
    return [icons[name] for name in names]


def render(svg: str, size_pixels: int) -> numpy.ndarray:
    """Renders an SVG over white; uint8, shape (size, size, 3)."""
    import resvg_py

    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=size_pixels, height=size_pixels, background="#ffffff", skip_system_fonts=True
    )
    return numpy.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def render_all(icons: Sequence[Icon], size_pixels: int, num_workers: int | None = None) -> numpy.ndarray:
    """Renders all drawings with several processes; uint8, shape (N, size, size, 3)."""
    with ProcessPoolExecutor(num_workers) as pool:
        pictures = pool.map(render, [i.svg for i in icons], [size_pixels] * len(icons), chunksize=32)
        return numpy.stack(list(pictures))


def save_pair(folder: Path, icon: Icon, size_pixels: int) -> None:
    """Writes one picture as PNG and its caption as a text file of the same stem."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^a-z0-9]+", "-", icon.name.lower()).strip("-")
    Image.fromarray(render(icon.svg, size_pixels)).save(folder / f"{stem}.png", optimize=True)
    (folder / f"{stem}.txt").write_text(icon.caption + "\n", encoding="utf-8")


def _plain_name(key: str, icons: dict[str, Any]) -> str:
    """Spells an icon's key as words, with skin tones alike in all sets: "..., dark skin tone"."""
    words = key.replace("-", " ")
    words = re.sub(r" tone([1-5])\b", lambda match: f" {_NUMBERED_TONES[match[1]]} skin tone", words)
    bare_tone = re.search(rf" {_TONE}$", words)
    if bare_tone and words[: bare_tone.start()].replace(" ", "-") in icons:
        words += " skin tone"
    # The tones go to the end; a couple has two.
    tones = re.findall(rf"{_TONE} skin tone", words)
    words = re.sub(rf" ?{_TONE} skin tone", "", words).strip()
    return ", ".join([words, *tones])


def _svg(entry: dict[str, Any], data: dict[str, Any]) -> str:
    """Builds a complete SVG with a square view box and the drawing in its middle."""
    width = entry.get("width", data.get("width", 16))
    height = entry.get("height", data.get("height", 16))
    side = max(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left:g} {top:g} {side} {side}">{entry["body"]}</svg>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=sorted(ICON_SETS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNG and caption files")
    parser.add_argument("--size", type=int, default=128, help="side in pixels")
    arguments = parser.parse_args()
    icons = read_icons(arguments.set)
    for icon in icons:
        save_pair(arguments.out, icon, arguments.size)
    print(f"{len(icons)} pictures in {arguments.out}")


if __name__ == "__main__":
    main()
