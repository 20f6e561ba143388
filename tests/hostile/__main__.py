"""Runs all hostile cases, or some, and prints what happened: see `tests/hostile/__init__.py`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import tests.preloaded  # noqa: F401 (every case is forked from a process that has the libraries)
from tests.hostile.catalogue import all_cases, in_sample
from tests.hostile.running import FINE, NAMED, Outcome, run_all


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", action="append", help="only cases of this kind; may be given several times")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--sample", action="store_true", help="only the cases that are part of the suite")
    parser.add_argument("--rounds", type=int, default=8, help="randomly damaged copies of each thing")
    parser.add_argument("--verbose", action="store_true", help="print what every command printed")
    parser.add_argument("--json", type=Path, help="file for all outcomes")
    arguments = parser.parse_args()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="pixtune-hostile-") as folder:
        cases = [
            case
            for case in all_cases(arguments.rounds, Path(folder))
            if case.kind in (arguments.kind or [case.kind]) and arguments.only in case.name
            if in_sample(case) or not arguments.sample
        ]
        for outcome in run_all(cases, arguments.seed, Path(folder)):
            outcomes.append(outcome)
            if arguments.verbose or not outcome.ok:
                show(outcome, arguments.seed, arguments.rounds)
    print(table(outcomes))
    if arguments.json:
        rows = [{"kind": o.case.kind, "name": o.case.name, "verdict": o.verdict, "seconds": o.seconds, "mib": o.mib,
                 "printed": o.printed[-2000:]} for o in outcomes]  # fmt: skip
        arguments.json.write_text(json.dumps(rows, indent=1))
    return int(not all(outcome.ok for outcome in outcomes))


def show(outcome: Outcome, seed: int, rounds: int) -> None:
    case = outcome.case
    print(f"{'ok' if outcome.ok else 'FAILURE'}: {case.kind}: {case.name}: {outcome.verdict}")
    again = f"python -m tests.hostile --seed {seed} --rounds {rounds} --kind '{case.kind}' --only '{case.name}'"
    print(f"  {outcome.seconds:.2f} s, {outcome.mib:.0f} MiB; again by: {again}")
    for line in outcome.printed[-1500:].splitlines():
        print(f"  | {line[:400]!a}")


def table(outcomes: list[Outcome]) -> str:
    """Returns counts, and the most seconds and memory, by kind."""
    of_kind: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        of_kind[outcome.case.kind].append(outcome)
        of_kind["all"].append(outcome)
    lines = [f"{'kind':<20} {'cases':>6} {'fine':>6} {'named':>6} {'failed':>6}  {'most s':>7} {'most MiB':>8}"]
    for kind, those in sorted(of_kind.items(), key=lambda item: item[0] == "all"):
        count = Counter(outcome.verdict for outcome in those)
        failed = sum(not outcome.ok for outcome in those)
        counts = "".join(f" {number:>6}" for number in (len(those), count[FINE], count[NAMED], failed))
        slowest, largest = max(o.seconds for o in those), max(o.mib for o in those)
        lines.append(f"{kind:<20}{counts}  {slowest:>7.2f} {largest:>8.0f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
