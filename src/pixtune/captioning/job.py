"""One `pixtune caption`: what is to be written, how it fits the machine, and writing it, file by file.

Each caption is a file as soon as it is there, so whatever is killed goes on with the same command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from pixtune.captioning.choosing import Choice, Chosen, Overwrite, choose
from pixtune.captioning.describe import Asked, Outcome, Wish, describe, load_captioner, measure
from pixtune.captioning.pictures import Picture, find_pictures, only_named
from pixtune.captioning.record import Written, add_to_record, read_records, record_of
from pixtune.config.folders import Folder
from pixtune.config.schema import TrainConfig
from pixtune.data.images import picture_digest
from pixtune.data.pairs import shorten
from pixtune.errors import DataError
from pixtune.family import Captioner, Placement
from pixtune.hardware.facts import HardwareFacts, host_room_bytes
from pixtune.inputs.reading import MEBIBYTE, read_bounded
from pixtune.launch.crew import ALONE, Crew
from pixtune.plan.captioning import CaptionPlan, CaptionSizes, plan_captions
from pixtune.plan.demands import demands_of
from pixtune.plan.footprint import ELEMENT_BYTES
from pixtune.plan.situation import usable_bytes
from pixtune.progress import announced, counted, say
from pixtune.storage.files import check_writable, text_digest, write_atomically
from pixtune.storage.model_folder import weight_files

_WORK = "writing captions"
LARGEST_LIST_BYTES = 64 * MEBIBYTE
"""Size that no list of names reaches: a million have less."""


@dataclass(frozen=True)
class Places:
    """Pictures to caption, and which of their captions are written."""

    folders: tuple[Folder, ...]
    shows_controls: bool = False
    """Whether a question shows the control pictures, too."""
    apart: tuple[Path, ...] = ()
    """Folders that have a purpose of their own, and are skipped."""
    only: tuple[str, ...] | None = None
    """Names of the pictures to look at; None: all."""
    overwrite: Overwrite = "nothing"
    share: tuple[int, int] = (0, 1)
    """Number of the share of the pictures to look at, 0 for the first, and of all shares."""


@dataclass(frozen=True)
class Job:
    """Everything that is decided before a captioner is loaded."""

    places: Places
    wish: Wish
    captioner: Captioner
    chosen: tuple[Chosen, ...]
    asked: tuple[Asked, ...]
    """Pictures that the captioner is asked about."""
    failed: tuple[Outcome, ...]
    """Pictures that are known to get no caption."""
    notes: tuple[str, ...]

    @property
    def kept(self) -> list[Chosen]:
        """Pictures whose caption stays as it is."""
        return [each for each in self.chosen if not each.choice.writes]


def open_job(places: Places, wish: Wish, captioner: Captioner) -> Job:
    """Looks at all files, and decides what is written. Writes nothing.

    Raises:
        DataError: there are no pictures, or problems that leave a caption's place in doubt.
        WriteError: a caption could not be written where it belongs.
    """
    pictures, notes = _find(places)
    if places.only is not None:
        pictures = only_named(pictures, places.only)
    share, num_shares = places.share
    pictures = pictures[share::num_shares]
    with_controls = places.shows_controls
    request_of = partial(_request_of, _shared_request(places, wish, captioner), with_controls)
    records = {folder.img_dir: read_records(folder.img_dir) for folder in places.folders}
    chosen, asked, failed = [], [], []
    for picture in pictures:
        try:
            decision = choose(picture, places.overwrite, records[picture.folder], request_of)
        except DataError as error:
            failed.append(Outcome(picture, None, " ".join(error.faults)))
            continue
        chosen.append(decision)
        if not decision.choice.writes:
            continue
        if with_controls and picture.lacks_controls:
            failed.append(Outcome(picture, None, f"{picture.path} has no control picture of its name."))
            continue
        if picture.caption_path.is_dir():
            failed.append(Outcome(picture, None, f"{picture.caption_path} is a folder, where a caption belongs."))
            continue
        measured = measure(captioner, wish, picture, with_controls)
        if isinstance(measured, Outcome):
            failed.append(measured)
        else:
            asked.append(measured)
    for folder in {each.picture.caption_path.parent for each in asked}:
        check_writable(folder, "Captions are written beside their pictures: copy them to where you may write.")
    return Job(places, wish, captioner, tuple(chosen), tuple(asked), tuple(failed), (*notes, *_notes(places, chosen)))


def _find(places: Places) -> tuple[list[Picture], list[str]]:
    """Finds the pictures of all folders; one that two of them share stands under the first.

    Raises:
        DataError: all problems of all folders.
    """
    pictures: dict[Path, Picture] = {}
    notes, faults = [], []
    for folder in places.folders:
        apart = [path for path in places.apart if path != folder.img_dir]
        controls = folder.control_dirs if places.shows_controls else ()
        try:
            found, of_folder = find_pictures(folder.img_dir, folder.captions.extension, controls, apart, folder.label)
        except DataError as error:
            faults += error.faults
            continue
        notes += of_folder
        for each in found:
            pictures.setdefault(each.caption_path.resolve(), each)
    if faults:
        raise DataError("these pictures cannot be captioned", faults)
    return list(pictures.values()), notes


def _notes(places: Places, chosen: Sequence[Chosen]) -> Iterator[str]:
    """Yields sentences on captions that are kept."""
    if by_hand := [each.picture.shown for each in chosen if each.choice is Choice.BY_HAND]:
        yield (
            f"captions that were written or changed by hand are kept: {shorten(by_hand)}. --overwrite-edited replaces "
            "them."
        )
    kept = [each.picture for each in chosen if each.choice is Choice.KEPT]
    if empty := [each.shown for each in kept if _is_empty(each)]:
        yield f"captions that are empty files are kept, too: {shorten(empty)}. Remove those to be filled."
    if kept and (places.only is not None or len(kept) == len(chosen)):
        yield (
            f"captions that are there are kept: {shorten(each.shown for each in kept)}. --overwrite replaces those "
            "that this command wrote, --overwrite-edited the others, too."
        )


def _is_empty(picture: Picture) -> bool:
    try:
        return picture.caption_path.stat().st_size == 0
    except OSError:
        return False


def _shared_request(places: Places, wish: Wish, captioner: Captioner) -> str:
    """Names everything that decides captions and is the same for all pictures."""
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in weight_files(captioner.path)]
    return repr((wish, places.shows_controls, weights))


def _request_of(shared: str, with_controls: bool, picture: Picture) -> str:
    """Returns the digest of everything that decides a picture's caption.

    Raises:
        DataError: a picture cannot be read.
    """
    paths = picture.all_paths if with_controls else (picture.path,)
    return text_digest(repr((shared, picture.shown, [picture_digest(path) for path in paths])))


def check_same_job(job: Job, crew: Crew) -> None:
    """Waits until all processes know what is to be written, and checks that it is the same. Before it, none writes.

    Raises:
        DataError: processes see other pictures or captions than this one.
    """
    own = text_digest("\n".join(str(each.picture.caption_path) for each in job.asked))
    if len(set(crew.gather("looking for pictures", own))) > 1:
        raise DataError(
            "the processes see different pictures",
            [
                "Each must see the same folders under the same names, and nobody may write captions there meanwhile. "
                "Machines without a shared disk each caption their own part: --share 1/2, --share 2/2."
            ],
        )


def make_plan(job: Job, memory: TrainConfig, facts: HardwareFacts, at_once: int | None = None) -> CaptionPlan:
    """Plans how the captioner fits a machine, by headers and sizes alone.

    Args:
        memory: the keys on memory and number format.
        at_once: pictures at once, at most.

    Raises:
        PlanError: it fits neither GPU nor host.
    """
    demands = demands_of(memory)
    sizes = CaptionSizes(
        job.captioner.weights,
        job.captioner.cached_numbers_per_token,
        max(each.num_tokens for each in job.asked),
        job.wish.max_tokens,
        ELEMENT_BYTES[demands.compute_format],
    )
    usable = usable_bytes(facts, demands) if facts.device == "cuda" else None
    quantize = memory.quantize if demands.may_quantize_encoders else False
    host = usable if facts.integrated else host_room_bytes(facts)
    return plan_captions(usable, sizes, len(job.asked), quantize, at_once, host)


def write_captions(
    job: Job, plan: CaptionPlan, placement: Placement, console: Console, crew: Crew = ALONE
) -> Iterator[Outcome]:
    """Writes the captions of a job, and yields what became of each picture once that is on the disk.

    Args:
        crew: processes that divide the pictures; this one yields its own. All must have the same job.

    Raises:
        TrainingError: another process of the crew failed.
        WeightsError: the captioner cannot be loaded.
        PlanError: memory is too short for one picture.
        WriteError: a caption could not be written; those before it are.
        DataError: a picture was taken away while it was described.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # what is loaded is announced here
    show: Callable[[str], None] = partial(say, console)
    at_once = min(crew.gather(_WORK, plan.at_once))  # a group must mean the same to all
    with announced("loading the captioner", show):
        encoder = load_captioner(job.captioner, plan, placement)
    with_controls = job.places.shows_controls
    request_of = partial(_request_of, _shared_request(job.places, job.wish, job.captioner), with_controls)
    share_of_places, num_shares = job.places.share
    record = record_of(share_of_places * crew.size + crew.rank, num_shares * crew.size)
    with (
        counted("writing captions", len(job.asked), console) as count,
        crew.sharing(_WORK, len(job.asked), count.reach) as share,
    ):
        own = share if crew.size > 1 else None
        for outcomes in describe(job.captioner, encoder, job.wish, job.asked, at_once, with_controls, own):
            for folder in {each.picture.folder for each in outcomes}:
                written = {
                    each.picture.name: Written(text_digest(each.caption.text), request_of(each.picture))
                    for each in outcomes
                    if each.caption is not None and each.picture.folder == folder
                }
                add_to_record(folder, written, record)
            for outcome in outcomes:
                if outcome.caption is not None:
                    write_atomically(outcome.picture.caption_path, f"{outcome.caption.text}\n".encode())
                share.made()
                yield outcome


def placement_for(memory: TrainConfig, device: torch.device) -> Placement:
    """Returns where the captioner works, and its plain number format."""
    return Placement(device, torch.bfloat16 if memory.mixed_precision == "bf16" else torch.float32)


def names_in(file: Path) -> Sequence[str]:
    """Reads names of pictures from a file, one a line; empty lines and those that begin with # are skipped.

    Raises:
        DataError: it cannot be read.
    """
    try:
        text = read_bounded(file, LARGEST_LIST_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("names of pictures cannot be read", [f"{file}: {error}"]) from error
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
