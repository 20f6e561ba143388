"""Interrupts, damages and disturbs random small runs for a given time, and compares each with its uninterrupted twin.

    make soak SECONDS=3600 SEED=1           # one run after the other, for an hour
    make soak SEED=1 ONLY=17                # run 17 of seed 1 again

Each run is drawn from the seed and its number: a model, a LoRA or all weights, optimizer, batches, services, cache, one
process or two. It is trained once without a disturbance. Then it is trained again, through sessions that are killed or
told to stop at random moments, whose disk fails at a random call, whose checkpoints, cache and log are damaged between
them, that are set back to older checkpoints, or that find another run in their folder. What comes out has to be equal
bit for bit, log included; a session may end with one clear error where something was done to it, and loses nothing.

Everything else is a failure: it is printed with the number that repeats it, and its folder is kept. The moments of
signals are shares of the uninterrupted run's duration, so a repetition is alike, not the same to the millisecond.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from tests import processes
from tests.io_faults import FailingDisk, random_fault
from tests.runs import write_config
from tests.soak.draws import Drawn, Happening, Settings, describe, draw_happening, draw_run, write_pictures
from tests.soak.harm import apply_harm, checkpoint_of
from tests.soak.judge import (
    Course,
    Ended,
    differing_files,
    differing_log,
    faults_of,
    leftovers,
    log_of,
    private_words,
)
from tests.soak.sessions import run_session, words_of

SECRET = "zyxsoak"
NONE_IS_WHOLE = "can be resumed from:"
"""Part of the refusal to choose among damaged checkpoints and those that were given up."""
MOST_SESSIONS = 8
MOST_FAILURES_KEPT = 5
LEAST_FREE_BYTES = 3 << 30


class FailureFound(Exception):
    """Something that is neither equal nor refused in one clear error."""


@dataclass
class Trial:
    """One drawn run, its uninterrupted twin, and the sessions that it is put through."""

    folder: Path
    seed: int
    number: int
    counts: Counter[str] = field(default_factory=Counter)
    printed: str = ""
    """All that the disturbed run's sessions have printed since it last began anew."""
    course: Course = field(default_factory=Course)
    harmed: set[Path] = field(default_factory=set)
    slowest_stop: float = 0.0

    def __post_init__(self) -> None:
        draw = random.Random(f"{self.seed} {self.number}")
        self.drawn: Drawn = draw_run(draw)
        self.settings: Settings = {**self.drawn.settings, **write_pictures(self.drawn, self.folder / "data", draw)}
        self.config = write_config(self.folder)
        self.output, self.cache = self.folder / "run" / SECRET, self.folder / "run" / "cache"
        self.twin = self.folder / "twin" / SECRET
        self.journal = self.folder / "journal"
        self.whole_seconds = 0.0
        self.note(str(self.drawn))

    def words(self, output: Path, **changes: object) -> list[str]:
        places = {"output_dir": output, "data_config__cache_dir": output.parent / "cache"}
        return words_of(self.config, {**self.settings, **places, **changes})

    # ---- the uninterrupted run

    def train_undisturbed(self) -> None:
        fault = FailingDisk(self.twin.parent, 0, journal=self.journal, reads=True)
        (ended,) = run_session(self.words(self.twin), self.drawn.num_processes, fault=fault)
        self.tell("uninterrupted", ended)
        if ended.code:
            raise FailureFound(f"the uninterrupted run ended with {ended.code}:\n{ended.printed[-3000:]}")
        self.whole_seconds = ended.seconds
        if self.drawn.num_processes > 1:
            self.journal = self.journal.with_name("journal.0")

    # ---- the disturbed one

    def train_disturbed(self) -> None:
        for number in range(MOST_SESSIONS if self.drawn.num_processes == 1 else 4):
            draw = random.Random(f"{self.seed} {self.number} {number}")
            finished = self.one_session(draw_happening(draw), number)
            if finished and draw.random() < 0.4:
                break
        left = (self.one_session(Happening(), MOST_SESSIONS + again) for again in range(2))  # it may have to begin anew
        if not any(left):
            raise FailureFound("the last session, to which nothing happened, did not finish")

    def one_session(self, happening: Happening, number: int) -> bool:
        """Damages, starts, disturbs and judges one session; returns whether the run is finished and equal."""
        self.damage(happening)
        on_disk = self.steps_on_disk()
        resume, target = "latest", None
        if happening.set_back is not None and on_disk:
            target = on_disk[int(happening.set_back * len(on_disk))]
            resume = f"checkpoint-{target:06d}"
            self.counts["set-backs"] += 1
        floor = self.course.floor(on_disk)
        changes = {} if happening.limit is None else {"checkpoints_total_limit": happening.limit}
        fault = None
        if happening.fault is not None:
            calls = self.journal.read_text().splitlines()
            fault = random_fault(self.output.parent, calls, happening.fault)
            fault.journal, fault.reads = self.folder / f"journal-{number}", True
        sessions = run_session(
            self.words(self.output, resume_from_checkpoint=resume, **changes), self.drawn.num_processes,
            self.whole_seconds, fault, happening.signals, happening.to_rank, happening.rival,
            [(self.output / name, share) for name, share in happening.requests],
        )  # fmt: skip
        for ended in sessions:
            self.tell(f"session {number} {describe(happening)} resume={resume}", ended)
            self.count(ended)
            causes = {
                "an I/O error": ended.fault,
                "a rival": happening.rival is not None and "is in use by" in ended.printed,
                "damage to every checkpoint": target is None and not floor and NONE_IS_WHOLE in ended.printed,
                "a damaged checkpoint by its name": target in self.course.damaged,
                "a lost process": ended.by_launcher and happening.to_rank and ended.signalled,
            }
            if found := [*faults_of(ended, [cause for cause, is_there in causes.items() if is_there])]:
                raise FailureFound("; ".join(found) + f"\n{ended.printed[-3000:]}")
            self.follow(ended, target, floor)
            if not floor and NONE_IS_WHOLE in ended.printed:
                self.start_anew()
        finished = any(ended.code == 0 for ended in sessions)
        if finished:
            wrong = [*self.differences()]
            if not (fault and fault.lasts):  # else nothing could be removed
                wrong += leftovers(self.output)
            if wrong:
                raise FailureFound("; ".join(wrong[:6]))
            self.counts["times finished and equal"] += 1
        return finished

    def damage(self, happening: Happening) -> None:
        for harm in happening.harms:
            for path in apply_harm(self.output, self.cache, harm):
                self.counts["damaged files"] += 1
                self.harmed.add(path.relative_to(self.output) if path.is_relative_to(self.output) else path)
                self.note(f"damaged ({harm[1]}): {path.relative_to(self.folder)}")
                if (step := checkpoint_of(self.output, path)) is not None:
                    self.course.damaged.add(step)

    def steps_on_disk(self) -> list[int]:
        found = [checkpoint_of(self.output, path) for path in self.output.glob("checkpoint-*")]
        return sorted(step for step in found if step is not None)

    def start_anew(self) -> None:
        """Does what a user has to do where every checkpoint of the course is damaged."""
        shutil.rmtree(self.output, ignore_errors=True)  # a rival that was refused as well has nothing left to remove
        self.course, self.printed = Course(), ""
        self.counts["begun anew, since every checkpoint was damaged"] += 1

    def follow(self, ended: Ended, target: int | None, floor: int) -> None:
        """Checks that no saved step was lost on the way into the session, and takes over what it saved."""
        self.printed += ended.printed
        before = Course([*self.course.steps])
        self.course.read(ended.printed, target)
        went_on = ended.printed.find("resuming after step ")
        if target is None and floor and went_on >= 0:
            start = int(ended.printed[went_on:].split()[3])
            passed_over = ended.fault and "It is left out; going on after" in ended.printed
            if start < floor and not passed_over:
                raise FailureFound(f"went on after step {start}, but step {floor} was saved ({before.steps})")
        began_anew = "data: " in ended.printed and went_on < 0
        if target is None and floor and began_anew and ended.outcome == "finished":
            raise FailureFound(f"began anew, but step {floor} was saved")

    def differences(self) -> Iterator[str]:
        """Yields how the finished run differs from its uninterrupted twin."""
        exported = [*self.twin.glob("*.safetensors"), *self.twin.glob("model/transformer/*.safetensors")]
        last = f"checkpoint-{int(str(self.settings['max_train_steps'])):06d}"
        paths = [*exported, *(self.twin / last).glob("*.safetensors"), *self.twin.glob("samples/**/*.png")]
        names = [path.relative_to(self.twin) for path in paths]
        left_out = "failed at step" in self.printed  # as was said
        for name in [name for name in names if name.suffix == ".png"]:  # drawn once, and looked at by nobody since
            if name in self.harmed or (left_out and not (self.output / name).is_file()):
                names.remove(name)
        yield from differing_files(self.twin, self.output, [str(name) for name in names])
        yield from differing_log(
            log_of(self.twin / "metrics.jsonl"), log_of(self.output / "metrics.jsonl"), self.printed
        )
        mine = [self.output / path.relative_to(self.twin) for path in exported]
        yield from private_words([path for path in mine if path.is_file()], [SECRET, str(self.folder)])

    # ---- bookkeeping

    def count(self, ended: Ended) -> None:
        self.counts["sessions"] += 1
        self.counts[ended.outcome] += 1
        self.counts["I/O errors"] += bool(ended.fault)
        for name in ended.signalled:
            self.counts[name] += 1
        if ended.outcome == "stopped":
            self.slowest_stop = max(self.slowest_stop, ended.seconds_after_signal)

    def tell(self, what: str, ended: Ended) -> None:
        parts = [ended.outcome, f"code {ended.code}", f"{ended.seconds:.1f} s", *ended.signalled, ended.fault]
        self.note(f"{what}: {', '.join(filter(None, parts))}\n{ended.printed}")

    def note(self, line: str) -> None:
        """Appends to what is told of the run, for whoever looks into a failure."""
        with (self.folder / "story.txt").open("a") as stream:
            stream.write(f"{line}\n")


@dataclass
class Result:
    """Figures of a soak."""

    seed: int
    first: int
    counts: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    slowest_stop_seconds: float = 0.0
    failures: list[dict[str, object]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def add(self, trial: Trial) -> None:
        """Counts a run that has been put through."""
        self.counts += trial.counts
        self.counts["runs"] += 1
        kinds = (trial.drawn.family, str(trial.settings["method"]), f"{trial.drawn.num_processes} processes")
        self.kinds.update(kinds)
        self.slowest_stop_seconds = round(max(self.slowest_stop_seconds, trial.slowest_stop), 1)

    def to_json(self) -> str:
        figures = {name: value for name, value in vars(self).items() if name != "began"}
        return json.dumps({**figures, "seconds": round(self.seconds)}, indent=1, sort_keys=True)


def put_through(trial: Trial) -> str | None:
    """Trains a run twice, once disturbed; returns what is wrong, if anything is."""
    try:
        trial.train_undisturbed()
        trial.train_disturbed()
    except FailureFound as failure:
        return str(failure)
    except subprocess.TimeoutExpired as error:
        return f"it hangs:\n{error.output}"
    except Exception:  # noqa: BLE001  (of the soak itself, which goes on and is mended later)
        return f"the soak itself failed:\n{traceback.format_exc()}"
    return None


def soak(seconds: float, seed: int, first: int, most: int | None, base: Path, file: Path | None) -> Result:
    """Puts one run after the other through it; returns the figures, which `file` has after each run."""
    result = Result(seed, first)
    for number in count(first):
        at, is_enough = result.seconds, most is not None and number - first >= most
        if at >= seconds or is_enough or shutil.disk_usage(base).free < LEAST_FREE_BYTES:
            break
        folder = base / f"run-{number}"
        folder.mkdir()
        trial = Trial(folder, seed, number)
        what = put_through(trial)
        if what is not None:
            trial.note(what)
            result.failures.append({"number": number, "what": what.split("\n")[0]})
            print(f"FAILURE in run {number}, repeated by SEED={seed} ONLY={number}, kept in {folder}\n{what}")
        if what is None or len(result.failures) > MOST_FAILURES_KEPT:
            shutil.rmtree(folder)
        result.add(trial)
        kind = f"{trial.drawn.family} {trial.settings['method']} x{trial.drawn.num_processes}"
        print(f"run {number}: {kind}, {trial.counts['sessions']} sessions, {result.seconds - at:.0f} s", flush=True)
        if file is not None:
            file.write_text(result.to_json())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--only", type=int, help="number of the one run to do")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--folder", type=Path, help="place for the runs; default: the system's temporary folder")
    given = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="pixtune-soak-", dir=given.folder))
    first, most = (given.first, None) if given.only is None else (given.only, 1)
    result = soak(given.seconds, given.seed, first, most, base, given.json)
    if not result.failures:
        shutil.rmtree(base)
    print(result.to_json())
    sys.exit(1 if result.failures else 0)


if __name__ == "__main__":
    assert processes.can_fork(), "a soak runs on a CPU, on Linux"
    main()
