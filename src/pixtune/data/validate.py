"""All problems of a data set in one report, before training starts.

Every picture is decoded to its last pixel and every caption read, so that no damaged file ends a run hours later.
Needs no torch. `validate_folder` returns a report, `validate_dataset` prints it for scripts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pixtune.config.folders import CaptionRules
from pixtune.data.buckets import Buckets, build_buckets, frame_picture
from pixtune.data.caption_tokens import CaptionCounter, cut_findings, lost_words
from pixtune.data.captions import with_prefix
from pixtune.data.doctor.examine import examine, same_files
from pixtune.data.doctor.looks import Look
from pixtune.data.findings import Case, Finding, Level, cases_of, count
from pixtune.data.masks import FoundMasks
from pixtune.data.pairs import Pair, Pairs, find_pairs, shorten
from pixtune.data.report_page import render, terminal_width
from pixtune.data.scan import Checked, Scan, scan_pictures
from pixtune.data.unchanged import find_unchanged
from pixtune.errors import DataError
from pixtune.launch.crew import ALONE, Crew
from pixtune.progress import announced, counted, printer, say
from pixtune.sizes import Size

MIN_SIDE_PIXELS = 16
"""Shortest usable side, in pixels, where the model is not known: the smallest `multiple` of the supported families."""

MANY_WORDS = 512
"""Captions of more words are named where the model is not known. The text-to-image families read 512 tokens, and each
word is at least one."""

NOTABLE_SHARE_LOST = 0.1
"""Share of a picture whose loss to cropping is worth a warning; a bucket near its shape costs about 0.02. It is also
the share of `img_size` squared pixels that a picture may lack without one."""

MOST_SHORTENED = 50
"""Number of cut captions whose lost words are looked for: each takes some forty counts of its beginnings."""


@dataclass(frozen=True)
class LongestCaption:
    """The longest caption, for the user to compare with what the text encoder reads."""

    path: Path
    num_characters: int


@dataclass(frozen=True)
class DatasetReport:
    """A folder's content and the findings on it."""

    image_folder: Path
    control_folders: tuple[Path, ...]
    num_pictures: int
    """Number of pictures, those with problems included and control pictures excluded."""
    findings: tuple[Finding, ...]
    bucket_counts: dict[Size, int]
    """Number of pictures by size; empty unless `img_size` was given."""
    longest_caption: LongestCaption | None
    looks: tuple[tuple[Path, Look], ...] = ()
    """Looks of the pictures, 4 KB each, where the doctor took them: to be compared with those of other folders."""

    def of_level(self, level: Level) -> tuple[Finding, ...]:
        """Returns the findings of a level."""
        return tuple(finding for finding in self.findings if finding.level == level)

    @property
    def faults(self) -> tuple[str, ...]:
        """Problems as whole sentences; without any, training can start."""
        return tuple(sentence for finding in self.of_level(Level.ERROR) for sentence in finding.sentences)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences on what a person should know and training copes with."""
        return tuple(sentence for finding in self.of_level(Level.WARNING) for sentence in finding.sentences)

    @property
    def ok(self) -> bool:
        """Whether training can start."""
        return not self.of_level(Level.ERROR)

    def render(self, all_names: bool = False, width: int | None = None) -> str:
        """Formats the report as plain text whose lines no name can forge; the arguments are those of `render`."""
        facts = [f"{width} x {height}: {number}" for (width, height), number in sorted(self.bucket_counts.items())]
        where = [f"Pictures: {self.image_folder}"]
        if self.control_folders:
            where.append(f"Control pictures: {', '.join(map(str, self.control_folders))}")
        if self.longest_caption is not None:
            longest = self.longest_caption
            where.append(f"Longest caption: {longest.num_characters} characters ({longest.path})")
        if facts:
            where.append(f"Sizes in training (width x height: pictures): {', '.join(facts)}")
        return render(self.num_pictures, self.findings, where, all_names, width)


@dataclass(frozen=True)
class Examination:
    """Settings of what is looked for beside damage."""

    triggers: Sequence[str] | None = None
    """Words that are to call up what is learned; None: it is not known whether there are some."""
    console: Console | None = None
    """Console for progress; None: none is shown."""
    rules: CaptionRules | None = None
    """Rules by which training makes captions of what is read; None: none."""


def validate_folder(
    image_folder: Path,
    caption_extension: str = "txt",
    img_size: int | None = None,
    multiple: int | None = None,
    control_folders: Sequence[Path] = (),
    allow_missing_controls: bool = False,
    upscale: bool = False,
    counter: CaptionCounter | None = None,
    doctor: Examination | None = None,
) -> DatasetReport:
    """Checks all pictures, captions and control pictures of a data set. Problems are reported, not raised.

    Args:
        image_folder: pictures with captions beside them, or a folder with `images/` and `control/` in it.
        caption_extension: the contract's `caption_type`.
        control_folders: control pictures, where they are not in `image_folder / "control"`.
        img_size, multiple, upscale, counter, doctor: as for `validate_pairs`.
    """
    image_folder, control_folders = find_layout(Path(image_folder), control_folders)
    found = find_pairs(image_folder, caption_extension, control_folders, allow_missing_controls)
    return validate_pairs(found, img_size, multiple, upscale, control_folders, counter, doctor)


def validate_pairs(
    found: Pairs,
    img_size: int | None = None,
    multiple: int | None = None,
    upscale: bool = False,
    control_folders: Sequence[Path] = (),
    counter: CaptionCounter | None = None,
    doctor: Examination | None = None,
    scan: Scan | None = None,
) -> DatasetReport:
    """Checks the files that `find_pairs` or `read_metadata` found.

    Args:
        img_size: training size in pixels, to report buckets, crops and small pictures for; None: they are not reported.
        multiple: number that the model's picture sides, in pixels, must be divisible by; None: `MIN_SIDE_PIXELS`.
        upscale: small pictures will be enlarged, as in `buckets.frame_picture`.
        counter: counts captions' tokens as the model does, to report those that it cuts; None: no model is known.
        doctor: also look for near copies, blur, captions that say nothing, pairs that do not lie on each other; None:
            for what training cannot cope with alone.
        scan: what `scan_of` found; None: it is called here.
    """
    multiple = multiple or MIN_SIDE_PIXELS
    targets = _targets(found)
    scan = scan or scan_of(found, doctor)
    pictures = [scan.pictures[path] for path in targets]
    captions, unreadable = _read_captions(found.pairs)
    findings = [
        _problems("files", "Files are missing or out of place", found.faults),
        _problems("picture-unreadable", "Pictures cannot be used", _sentences(scan)),
        _problems("picture-too-small", "Pictures are too small", _too_small(scan, multiple)),
        _problems("caption-unreadable", "Captions cannot be read", unreadable),
        Finding(Level.WARNING, "files-passed-over", "Files are passed over", cases_of(found.warnings), "", True),
        _notes_of_decoders(scan),
        *_empty_captions(captions),
        *(_long_captions(captions) if counter is None else _cut_captions(captions, scan, counter, doctor)),
    ]
    bucket_counts: Counter[Size] = Counter()
    if img_size is not None and img_size < multiple:
        findings.append(
            _problems(
                "img-size", "The size is impossible", [f"img_size is {img_size}; it must be at least {multiple}."]
            )
        )
    elif img_size is not None:
        usable = [picture for picture in pictures if picture.size and min(picture.size) >= multiple]
        bucket_counts, more = _fill_buckets(usable, build_buckets(img_size, multiple), upscale)
        findings += more
    copies = same_files(pictures)
    findings += [_same_files(copies), *find_unchanged(found.pairs, scan.pictures)]
    if doctor is not None:
        name_of = {pair.image_path: pair.name for pair in found.pairs} | {
            path: path.name for path in found.lone_pictures
        }
        with announced("comparing pictures and captions", _shower(doctor)):
            large = [path for path in targets if min(scan.pictures[path].size or (0,)) >= multiple]
            rules = doctor.rules
            trained = [(pair, with_prefix(text, rules) if rules else text) for pair, text in captions]
            one_caption = rules is not None and rules.text is not None
            findings += examine(scan, large, trained, copies, name_of, img_size, doctor.triggers, one_caption)
    return DatasetReport(
        found.folder, tuple(control_folders), len(targets), tuple(each for each in findings if each.cases),
        dict(bucket_counts), _longest(captions), tuple((each.path, each.look) for each in pictures if each.look),
    )  # fmt: skip


def mask_findings(masks: FoundMasks) -> tuple[Finding, ...]:
    """Returns what was found in a folder's masks as findings."""
    findings = (
        _problems("masks", "Masks cannot be used", masks.faults),
        Finding(Level.WARNING, "masks-unlike", "Masks are unlike their pictures", cases_of(masks.warnings), "", True),
    )
    return tuple(finding for finding in findings if finding.cases)


def validate_dataset(path: str | Path, caption_extension: str = "txt", img_size: int | None = None) -> bool:
    """Prints the report on a data set, and returns whether training can start."""
    report = validate_folder(Path(path), caption_extension, img_size, doctor=Examination(console=Console(stderr=True)))
    print(report.render(width=terminal_width()))
    return report.ok


def find_layout(folder: Path, control_folders: Sequence[Path]) -> tuple[Path, tuple[Path, ...]]:
    """Finds image and control folders: a folder with both `images` and `control` in it is an editing data set."""
    if not control_folders and (folder / "images").is_dir() and (folder / "control").is_dir():
        return folder / "images", (folder / "control",)
    return folder, tuple(control_folders)


def scan_of(found: Pairs, doctor: Examination | None = None, crew: Crew = ALONE) -> Scan:
    """Decodes all pictures, as `scan_pictures` does."""
    targets = _targets(found)
    paths = [*targets, *sorted({path for pair in found.pairs for path in pair.control_paths} - set(targets))]
    if doctor is None or doctor.console is None:
        return scan_pictures(paths, found.pairs, doctor is not None, crew=crew)
    with counted("checking pictures", len(paths), doctor.console) as done:
        return scan_pictures(paths, found.pairs, True, done)


def _targets(found: Pairs) -> list[Path]:
    return sorted({pair.image_path for pair in found.pairs} | set(found.lone_pictures))


def _shower(doctor: Examination) -> Callable[[str], object]:
    console = doctor.console
    return printer(quiet=True) if console is None else lambda line: say(console, line)


def _problems(code: str, heading: str, sentences: Sequence[str]) -> Finding:
    return Finding(Level.ERROR, code, heading, cases_of(sentences), one_by_one=True)


def _sentences(scan: Scan) -> list[str]:
    return [sentence for picture in scan.pictures.values() for sentence in picture.faults]


def _too_small(scan: Scan, multiple: int) -> list[str]:
    return [
        f"{picture.path} is {picture.size[0]}x{picture.size[1]} pixels; each side must have at least {multiple}. "
        "Remove or replace it."
        for picture in scan.pictures.values()
        if picture.size and min(picture.size) < multiple
    ]


def _notes_of_decoders(scan: Scan) -> Finding:
    cases = [
        Case(f"{picture.path} {note}.", (str(picture.path),))
        for picture in scan.pictures.values()
        for note in picture.notes
    ]
    return Finding(
        Level.WARNING, "picture-converted", "Pictures were converted by guess", tuple(cases), one_by_one=True
    )


def _read_captions(pairs: Sequence[Pair]) -> tuple[list[tuple[Pair, str]], list[str]]:
    """Reads the captions: those that can be read, each with its pair, and sentences on the others."""
    captions, faults = [], []
    for pair in pairs:
        try:
            captions.append((pair, pair.read_caption()))
        except DataError as error:
            faults += error.faults
    return captions, faults


def _longest(captions: Sequence[tuple[Pair, str]]) -> LongestCaption | None:
    pair, text = max(captions, key=lambda each: len(each[1]), default=(None, ""))
    return LongestCaption(pair.caption_place, len(text)) if pair and text else None


def _empty_captions(captions: Sequence[tuple[Pair, str]]) -> list[Finding]:
    """Warns of empty captions. They are no problem: they train like a dropped caption, which some styles want."""
    empty = [str(pair.caption_place) for pair, text in captions if not text]
    meaning = f"{count(len(empty), 'caption is', 'captions are')} empty, to be trained without words"
    return [
        Finding(
            Level.WARNING,
            "caption-empty",
            meaning,
            tuple(Case(place, (place,)) for place in empty),
            "Fill those that are not meant to be.",
        )
    ]


def _long_captions(captions: Sequence[tuple[Pair, str]]) -> list[Finding]:
    """Notes captions that every model cuts, where none is known."""
    wordy = [
        Case(f"{pair.caption_place} ({num_words} words)", (str(pair.caption_place),), {"words": num_words})
        for pair, text in captions
        if (num_words := len(text.split())) > MANY_WORDS
    ]
    meaning = (
        f"{count(len(wordy), 'caption has', 'captions have')} more than {MANY_WORDS} words, so cut by models that read "
        f"{MANY_WORDS} tokens"
    )
    remedy = "Name the model to see what is lost: --model MODEL."
    return [Finding(Level.NOTE, "caption-long", meaning, tuple(wordy), remedy)]


def _cut_captions(
    captions: Sequence[tuple[Pair, str]], scan: Scan, counter: CaptionCounter, doctor: Examination | None
) -> list[Finding]:
    """Warns of captions that the counter's model cuts. Control pictures that cannot be read take no tokens here."""

    def outline(pair: Pair, text: str) -> tuple[str, list[Size]]:
        return text, [size for path in pair.control_paths if (size := scan.pictures[path].size)]

    lengths = counter.count([outline(pair, text) for pair, text in captions])
    named = [(str(pair.caption_place), row) for (pair, _), row in zip(captions, lengths, strict=True)]
    if doctor is None:
        return cut_findings(named)
    cut = [each for each, row in zip(captions, lengths, strict=True) if row and all(length.is_cut for length in row)]
    cut = cut[:MOST_SHORTENED]
    words = lost_words(
        [text for _, text in cut],
        lambda tries: counter.count([outline(cut[number][0], text) for number, text in tries]),
    )
    return cut_findings(named, {str(pair.caption_place): lost for (pair, _), lost in zip(cut, words, strict=True)})


def _fill_buckets(pictures: Sequence[Checked], buckets: Buckets, upscale: bool) -> tuple[Counter[Size], list[Finding]]:
    """Counts the pictures of each size; warns of small, enlarged and heavily cropped ones."""
    framings = [(each.path, frame_picture(*each.size, buckets, upscale=upscale)) for each in pictures if each.size]
    enlarged = [
        Case(f"{path} ({framing.scale:.2f}x)", (str(path),), {"scale": framing.scale})
        for path, framing in framings
        if framing.upscaled
    ]
    small = [
        Case(f"{path} ({framing.width}x{framing.height})", (str(path),))
        for path, framing in framings
        if framing.size not in buckets.sizes
        and framing.width * framing.height < (1 - NOTABLE_SHARE_LOST) * buckets.img_size**2
    ]
    cropped = [
        Case(f"{path} ({framing.share_lost:.0%})", (str(path),), {"share_lost": framing.share_lost})
        for path, framing in framings
        if framing.share_lost > NOTABLE_SHARE_LOST
    ]
    findings = [
        Finding(
            Level.WARNING, "enlarged",
            f"{count(len(enlarged), 'picture is', 'pictures are')} enlarged to reach img_size {buckets.img_size}",
            tuple(enlarged),
            "Enlarged ones are blurred: take larger ones, or a smaller img_size.",
        ),
        Finding(
            Level.WARNING, "small",
            f"{count(len(small), 'picture has', 'pictures have')} fewer pixels than img_size {buckets.img_size} asks "
            "for and train at the size in brackets, not enlarged",
            tuple(small),
            "Take larger ones if you have them.",
        ),
        Finding(
            Level.WARNING, "cropped",
            f"{count(len(cropped), 'picture loses', 'pictures lose')} more than {NOTABLE_SHARE_LOST:.0%} to cropping",
            tuple(cropped),
            "Cut out what matters yourself.",
        ),
    ]  # fmt: skip
    return Counter(framing.size for _, framing in framings), findings


def _same_files(groups: Sequence[Sequence[str]]) -> Finding:
    """Warns of every set of files with the same bytes: they count twice in training."""
    cases = tuple(Case(f"These pictures are the same file: {shorten(group)}.", tuple(group)) for group in groups)
    return Finding(Level.WARNING, "same-file", "Pictures are the same file", cases, "Keep one of each.", True)
