"""Findings of the doctor: near copies, blur, odd pictures, captions, and pairs that do not lie on each other."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from pixtune.data.buckets import DEFAULT_MAX_ASPECT
from pixtune.data.doctor.captions import Caption, lint_captions
from pixtune.data.doctor.duplicates import LEAST_CONTRAST, find_near_copies
from pixtune.data.doctor.looks import Look
from pixtune.data.doctor.pair_looks import SIDES, PairLook
from pixtune.data.findings import Case, Finding, Level, count
from pixtune.data.pairs import Pair
from pixtune.data.scan import Checked, Scan
from pixtune.judging.alignment import MOST_PIXELS_ASIDE, Alignment

FEWEST_TO_COMPARE = 5
"""Number of pictures below which none of them can be told to be unlike the others."""

BLURRED_BY = 0.55
"""Smallest number of halvings below the set's median at which sharpness is a blur's.

Measured, sharpness as smallest / median / largest over the pictures (`Look.sharpness`):

    demo-style as it is         0.77 / 0.87 / 1.31      noise of spectra f^-0.8 to f^-1.4    0.97 / 1.22 / 1.45
    blurred by 0.7 pixels       0.46 / 0.50 / 0.67                                           0.57 / 0.64 / 0.73
    blurred by 1 pixel          0.36 / 0.38 / 0.41                                           0.40 / 0.43 / 0.45
    enlarged twofold            0.38 / 0.40 / 0.43                                           0.38 / 0.39 / 0.40
"""
_SMALL_SHARE = 0.25
"""Share of the set's median number of pixels below which a picture is small beside the others."""
OFF_PIXELS = 1.0
"""Distance in pixels from which a pair does not lie on each other."""
_ALIKE_SHARE = 0.6
_UNLIKE_CONFIDENCE = 0.2


def examine(
    scan: Scan,
    targets: Sequence[Path],
    captions: Sequence[tuple[Pair, str]],
    copies: Sequence[Sequence[str]],
    name_of: Mapping[Path, str],
    img_size: int | None,
    triggers: Sequence[str] | None,
    one_caption: bool = False,
) -> list[Finding]:
    """Reports what a person would like to know of pictures and captions that can be read.

    Args:
        targets: all pictures but controls.
        captions: examples with captions that can be read.
        copies: groups of paths with the same bytes, which are reported already.
        name_of: short names by path.
        img_size: training size in pixels; None: small pictures and extreme shapes are found by the set itself.
        triggers: as for `lint_captions`.
        one_caption: one caption for all pictures is meant so.
    """
    pictures = [scan.pictures[path] for path in targets if scan.pictures[path].look is not None]
    of_edits = any(pair.control_paths for pair, _ in captions)
    text_of = {pair.image_path: text for pair, text in captions}
    read = [Caption(pair.name, Path(pair.name).stem, text, str(pair.caption_place)) for pair, text in captions]
    findings = [
        *_near_copies(pictures, copies, text_of, name_of),
        *_blurred(pictures, name_of),
        *_plain(pictures, name_of),
        *(_odd_sizes(pictures, name_of) if img_size is None else ()),
        *lint_captions(read, triggers, of_edits or one_caption),
        *find_misaligned(scan.pairs, name_of),
    ]
    return [finding for finding in findings if finding.cases]


def _near_copies(
    pictures: Sequence[Checked],
    copies: Sequence[Sequence[str]],
    text_of: Mapping[Path, str],
    name_of: Mapping[Path, str],
) -> Iterator[Finding]:
    number_of = {str(picture.path): number for number, picture in enumerate(pictures)}
    known = [[number_of[path] for path in group if path in number_of] for group in copies]
    found = find_near_copies([picture.look for picture in pictures if picture.look], known)
    cases = []
    for group in found.groups:
        paths = [pictures[number].path for number in group]
        captions = {text_of[path] for path in paths if path in text_of}
        detail = "their captions differ" if len(captions) > 1 else ""
        listed = " = ".join(name_of[path] for path in paths[:4]) + (f" = {len(paths) - 4} more" if paths[4:] else "")
        cases.append(Case(listed, tuple(map(str, paths)), detail=detail))
    pictures_in_groups = sum(map(len, found.groups))
    left_out = f" ({found.num_left_out:,} pairs were too many to compare)" if found.num_left_out else ""
    yield Finding(
        Level.WARNING, "near-duplicates",
        f"{count(len(found.groups), 'group', 'groups')} of {pictures_in_groups} pictures that are nearly the same"
        + left_out,
        tuple(cases),
        "A picture that comes twice is learned by heart sooner: keep the best one of each group.",
    )  # fmt: skip


def _blurred(pictures: Sequence[Checked], name_of: Mapping[Path, str]) -> Iterator[Finding]:
    sharp = {
        picture.path: math.log2(sharpness)
        for picture in pictures
        if picture.look and (sharpness := picture.look.sharpness)
    }
    if len(sharp) < FEWEST_TO_COMPARE:
        return
    usual = median(sharp.values())
    spread = 1.4826 * median(abs(value - usual) for value in sharp.values())
    limit = usual - max(3 * spread, BLURRED_BY)
    sharp |= {picture.path: -math.inf for picture in pictures if picture.look and _shows_no_edge(picture.look)}
    cases = tuple(
        Case(f"{name_of[path]} ({2 ** (value - usual):.0%})", (str(path),), {"share_of_usual": 2 ** (value - usual)})
        for path, value in sorted(sharp.items(), key=lambda item: item[1])
        if value < limit
    )
    yield Finding(
        Level.WARNING, "blurred",
        f"{count(len(cases), 'picture is', 'pictures are')} blurred or enlarged, with this share of the usual detail",
        cases,
        "Replace or remove them, unless blur is what you want to teach.",
    )  # fmt: skip


def _shows_no_edge(look: Look) -> bool:
    """Returns whether a picture shows something, and that without a single edge."""
    return look.sharpness is None and look.contrast > 4 * LEAST_CONTRAST and look.is_large


def _plain(pictures: Sequence[Checked], name_of: Mapping[Path, str]) -> Iterator[Finding]:
    plain = [picture.path for picture in pictures if picture.look and picture.look.contrast < LEAST_CONTRAST]
    yield Finding(
        Level.WARNING, "plain",
        f"{count(len(plain), 'picture is', 'pictures are')} nearly of one colour",
        tuple(Case(name_of[path], (str(path),)) for path in plain),
        "There is nothing to learn from them: remove them, or look whether they were saved as you wanted.",
    )  # fmt: skip


def _odd_sizes(pictures: Sequence[Checked], name_of: Mapping[Path, str]) -> Iterator[Finding]:
    """Reports small and long pictures where no training size is known."""
    sizes = {picture.path: picture.size for picture in pictures if picture.size}
    if len(sizes) >= FEWEST_TO_COMPARE:
        usual = median(width * height for width, height in sizes.values())
        small = [(path, size) for path, size in sizes.items() if size[0] * size[1] < _SMALL_SHARE * usual]
        yield Finding(
            Level.WARNING, "small-beside-others",
            f"{count(len(small), 'picture has', 'pictures have')} less than a quarter of the usual number of pixels",
            tuple(Case(f"{name_of[path]} ({width}x{height})", (str(path),)) for path, (width, height) in small),
            "They train at their own size, in batches apart, or enlarged and blurred: replace them by larger ones.",
        )  # fmt: skip
    long = [(path, max(size) / min(size)) for path, size in sizes.items() if max(size) > DEFAULT_MAX_ASPECT * min(size)]
    yield Finding(
        Level.WARNING, "extreme-shape",
        count(len(long), "picture trains as its", "pictures train as their")
        + f" middle alone, being longer than {DEFAULT_MAX_ASPECT:.0f} : 1",
        tuple(
            Case(f"{name_of[path]} ({ratio:.1f} : 1)", (str(path),), {"aspect_ratio": ratio}) for path, ratio in long
        ),
        "Cut out what matters yourself.",
    )  # fmt: skip


def find_misaligned(pairs: Mapping[Path, PairLook], name_of: Mapping[Path, str]) -> Iterator[Finding]:
    sure = {path: look for path, look in pairs.items() if look.alignment.is_sure}
    off = {path: look for path, look in sure.items() if look.alignment.off_pixels > _most_off(look)}
    yield Finding(
        Level.WARNING, "pair-misaligned",
        count(len(off), "control does not lie on its target", "controls do not lie on their targets")
        + _in_common(off, len(sure)),
        tuple(_pair_case(path, name_of, in_words(look.alignment), look.alignment) for path, look in off.items()),
        "The model learns to shift or zoom what it should keep: crop both alike.",
    )  # fmt: skip
    bordered = {
        path: "; ".join(
            f"{whose} {', '.join(f'{width:.0%} {side}' for width, side in zip(border, SIDES, strict=True) if width)}"
            for whose, border in (("control", look.control_border), ("target", look.target_border))
            if any(border)
        )
        for path, look in pairs.items()
        if _has_border(look, is_redrawn=2 * len(sure) < len(pairs))
    }
    yield Finding(
        Level.WARNING, "pair-border",
        f"{count(len(bordered), 'pair has', 'pairs have')} a plain border in one picture alone",
        tuple(_pair_case(path, name_of, words, pairs[path].alignment) for path, words in bordered.items()),
        "The model learns to add or remove it: cut it off, or give it to both.",
    )  # fmt: skip
    if len(pairs) >= FEWEST_TO_COMPARE and len(sure) >= 0.8 * len(pairs):
        unlike = [
            path
            for path, look in pairs.items()
            if look.alignment.confidence < _UNLIKE_CONFIDENCE and path not in bordered
        ]
        yield Finding(
            Level.WARNING, "pair-unlike",
            f"{count(len(unlike), 'control shows', 'controls show')} nothing of its target, unlike the others",
            tuple(Case(name_of[path], (str(path),)) for path in unlike),
            "Look whether the files were mixed up.",
        )  # fmt: skip
    elif len(sure) < len(pairs):
        unknown = [path for path in pairs if path not in sure]
        yield Finding(
            Level.NOTE, "pair-redrawn",
            f"{len(unknown)} of {count(len(pairs), 'pair shares', 'pairs share')} too few edges to measure whether one "
            "lies on the other",
            tuple(Case(name_of[path], (str(path),)) for path in unknown),
            "That is right where the edit draws everything anew; look at some of them yourself.",
        )  # fmt: skip


def _has_border(look: PairLook, is_redrawn: bool) -> bool:
    """Returns whether one picture has a border; where all is drawn anew, a band on one side may be the sea."""
    borders = (look.control_border, look.target_border)
    if is_redrawn:
        return any(border[side] and border[side + 2] for border in borders for side in (0, 1))
    return any(map(any, borders))


def _most_off(look: PairLook) -> float:
    """Returns the distance in the target's pixels that is tolerated: a pixel of the coarser picture.

    Large pictures are compared at `MOST_PIXELS_ASIDE` pixels, to a few hundredths of those: less says nothing.
    """
    coarser = look.alignment.size[0] / look.control_size[0]
    return max(OFF_PIXELS, OFF_PIXELS * coarser, 0.15 * max(look.alignment.size) / MOST_PIXELS_ASIDE)


def _in_common(off: Mapping[Path, PairLook], num_sure: int) -> str:
    """Returns a remark where most pairs are off in the same way: a mistake of a script, not of single files."""
    if len(off) < FEWEST_TO_COMPARE or len(off) < _ALIKE_SHARE * num_sure:
        return ""
    found = [look.alignment for look in off.values()]
    x, y = (median(each.shift_pixels[axis] for each in found) for axis in (0, 1))
    usual = Alignment((x, y), median(each.scale for each in found), 1.0, found[0].size)
    rests = [
        Alignment((each.shift_pixels[0] - x, each.shift_pixels[1] - y), each.scale - usual.scale + 1, 1.0, each.size)
        for each in found
    ]
    alike = sum(rest.off_pixels < OFF_PIXELS for rest in rests)
    if alike < _ALIKE_SHARE * num_sure:
        return ""
    return f", {alike} of them in the same way ({in_words(usual)}), so look at how they were made"


def in_words(alignment: Alignment) -> str:
    """Describes how a control lies to its target, as "3.0 px right, 1.0% smaller"."""
    x, y = (-shift / alignment.scale for shift in alignment.shift_pixels)
    words = [
        f"{abs(distance):.1f} px {way[distance > 0]}"
        for distance, way in ((x, ("left", "right")), (y, ("up", "down")))
        if abs(distance) >= 0.3
    ]
    growth = 1 / alignment.scale - 1
    if abs(growth) * max(alignment.size) / 2 >= 0.5:
        words.append(f"{abs(growth):.1%} {'larger' if growth > 0 else 'smaller'}")
    return ", ".join(words) or "in place"


def _pair_case(path: Path, name_of: Mapping[Path, str], words: str, alignment: Alignment) -> Case:
    figures = {
        "shift_right_pixels": round(alignment.shift_pixels[0], 2),
        "shift_down_pixels": round(alignment.shift_pixels[1], 2),
        "scale": round(alignment.scale, 4),
        "off_pixels": round(alignment.off_pixels, 2),
        "confidence": round(alignment.confidence, 3),
    }
    return Case(f"{name_of[path]} ({words})", (str(path),), figures)


def same_files(pictures: Sequence[Checked]) -> list[list[str]]:
    """Returns the groups of pictures with the same bytes."""
    groups: dict[str, list[str]] = defaultdict(list)
    for picture in pictures:
        if picture.digest:
            groups[picture.digest].append(str(picture.path))
    return [group for group in groups.values() if len(group) > 1]
