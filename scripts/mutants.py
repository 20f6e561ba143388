"""Mutates pixtune by a seed, one place at a time, and reports which mutations no test notices: `make mutants SEED=7`.

Each mutant is judged by the tests that execute its line, by a map that one run of the suite makes; the first test that
fails ends it. As many are judged at once as there are cores, each in a copy of the tree. Processes that run tests are
forked from ones that have imported the libraries. Everything is written below `build/mutants`; what was judged is not
judged again.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from itertools import islice, pairwise
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from executing_tests import ROOT, SOURCE, ExecutingTests, LineMap
from mutations import Mutation, mutations_of

WORK = ROOT / "build" / "mutants"
MAPS = WORK / "maps"
AT_ONCE = os.cpu_count() or 1
FREE_TREES: SimpleQueue[Path] = multiprocessing.SimpleQueue()
"""Copies of the tree in which nothing is judged at the moment."""
NEEDS_GPU = {"engine/triton_kernels.py"}
"""Files in a language that only a GPU runs."""
GPU_WORDS = re.compile(r"cuda|nvml|triton|_scaled_mm|tensor_cores", re.IGNORECASE)
"""What a function mentions that a GPU runs: where no test executes it, its lines are excluded, and counted."""
ROUNDS = (0, 6, 30, 10**6)
"""Where the tests of a mutant are divided into rounds: most are noticed by the first few."""
STARTING_SECONDS, SLOWER = 60, 6
"""The limit of a round of tests: what starting them takes, and how much slower than in the map they may be."""
ONE_BY_ONE = {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip
"""The environment of tests: as `tests/conftest.py` sets it before libraries are imported."""

SURVIVED = ("survived", "not executed")

Place = tuple[str, int]
"""A file below `src/pixtune` and a line."""
Mutant = tuple[str, Mutation]
"""A file below `src/pixtune`, and what is changed in it."""


# ---- which mutants


def draw(pool: dict[Place, list[Mutation]], seed: int) -> list[Mutant]:
    """Puts all lines into an order by a seed, each with one of its mutations: as many as wanted are taken from it."""
    generator = random.Random(seed)
    places = generator.sample(sorted(pool), len(pool))
    return [(place[0], generator.choice(pool[place])) for place in places]


def gpu_lines(source: str, executed: set[int]) -> set[int]:
    """Returns lines that only a GPU executes: no test does, and their function speaks of one."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    of_gpu = [f for f in functions if GPU_WORDS.search(ast.get_source_segment(source, f) or "")]
    return {line for f in of_gpu for line in range(f.lineno, (f.end_lineno or f.lineno) + 1)} - executed


def all_mutations(tests: ExecutingTests) -> tuple[dict[Place, list[Mutation]], set[Mutant]]:
    """Returns the mutations of each line, and those that are left out because nothing but a GPU executes them."""
    pool: dict[Place, list[Mutation]] = {}
    left_out: set[Mutant] = set()
    for path in sorted(SOURCE.rglob("*.py")):
        file, source = path.relative_to(SOURCE).as_posix(), path.read_text()
        of_gpu = gpu_lines(source, {line for line, by in tests.at(file).items() if by})
        for mutation in mutations_of(source):
            pool.setdefault((file, mutation.line), []).append(mutation)
            if file in NEEDS_GPU or (mutation.lines and of_gpu.issuperset(mutation.lines)):
                left_out.add((file, mutation))
    return pool, left_out


# ---- a mutant's trial


def key_of(file: str, mutation: Mutation) -> tuple[str | int, ...]:
    """Returns by what a report of an earlier call knows a mutation."""
    source = (SOURCE / file).read_text()
    return file, mutation.line, *changed_lines(source, mutation.apply(source))


def changed_lines(source: str, mutant: str) -> list[str]:
    """Returns a diff without its heads."""
    rows = [*difflib.unified_diff(source.splitlines(), mutant.splitlines(), n=0, lineterm="")][2:]
    return [row for row in rows if not row.startswith("@@")]


def judge(file: str, mutation: Mutation, seconds: dict[str, float], num_tests: int) -> dict[str, Any]:
    """Runs tests that may notice a mutation, on a tree that is changed for it, and returns the verdict.

    Args:
        file: Path below `src/pixtune`.
        mutation: What is changed in it.
        seconds: The tests in the order in which they are run, and the seconds that each of them took once.
        num_tests: Number of tests that might notice it, for the report.
    """
    source = (SOURCE / file).read_text()
    mutant = mutation.apply(source)
    verdict: dict[str, Any] = {"file": file, "line": mutation.line, "kind": mutation.kind}
    verdict["diff"] = changed_lines(source, mutant)
    if ast.dump(ast.parse(mutant)) == ast.dump(ast.parse(source)):
        return verdict | {"verdict": "equivalent", "by": "the same code"}
    verdict |= {"tests": len(seconds), "of": num_tests}
    tree = FREE_TREES.get()
    place, began = tree / "src" / "pixtune" / file, time.monotonic()
    try:
        place.write_text(mutant)
        os.utime(place, (time.time() + 1e6, time.time() + 1e6))  # so that no compiled file is taken for this one's
        for begin, end in pairwise(ROUNDS):
            if round_of_tests := [*seconds][begin:end]:
                limit = STARTING_SECONDS + SLOWER * sum(seconds[test] for test in round_of_tests)
                outcome, failed = run_tests(tree, round_of_tests, limit, "-x")
                if outcome != "survived":
                    by = failed[0] if failed else ""
                    return verdict | {"verdict": outcome, "by": by, "seconds": round(time.monotonic() - began)}
    finally:
        shutil.copy2(SOURCE / file, place)
        FREE_TREES.put(tree)
    return verdict | {"verdict": "survived" if seconds else "not executed", "seconds": round(time.monotonic() - began)}


def within_budget(ordered: Sequence[str], seconds: dict[str, float], budget_seconds: float) -> dict[str, float]:
    """Returns the first tests with their seconds, as many as fit into a time; one that would not fit is passed over."""
    chosen, left = {}, budget_seconds
    for test in ordered:
        if seconds[test] <= left:
            chosen[test] = seconds[test]
            left -= seconds[test] + 0.01
    return chosen


def run_tests(tree: Path, tests: Sequence[str], limit_seconds: float, *options: str) -> tuple[str, list[str]]:
    """Runs tests on a tree in a process of its own.

    Returns:
        "killed", "timeout" or "survived", and the tests that failed.
    """
    printed = tree.with_suffix(".txt")
    child = os.fork()
    if child == 0:
        os.setsid()
        with printed.open("wb") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        os.chdir(tree)
        sys.path[:0] = of_tree = [str(tree / "src"), str(tree)]
        os.environ["PYTHONPATH"] = os.pathsep.join(of_tree)
        import pytest

        from tests import processes

        # Processes of tests are forked from this one, which saves each the seconds of a server that imports everything.
        processes.server = lambda: multiprocessing.get_context("fork")  # type: ignore[assignment]
        sys.modules[processes.PRELOADED] = processes
        os._exit(int(pytest.main(["-q", "-rfE", "-p", "no:cacheprovider", "--tb=no", "--no-header", *options, *tests])))
    deadline = time.monotonic() + limit_seconds
    status = None
    while status is None and time.monotonic() < deadline:
        ended, code = os.waitpid(child, os.WNOHANG)
        status = code if ended else None
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # with what it has started
    if status is None:
        os.waitpid(child, 0)
        return "timeout", []
    text = printed.read_text(errors="replace")
    if "ERROR: not found:" in text:
        raise SystemExit(f"the map names tests that are no more: delete {MAPS}, and it is made anew\n{text}")
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.MULTILINE)
    return ("killed", failed or [text[-300:]]) if status else ("survived", [])


def fail_anyway(tree: Path, tests: Sequence[str]) -> set[str]:
    """Returns which tests fail on the tree without a mutation, and so have shown nothing."""
    return set(run_tests(tree, tests, STARTING_SECONDS * 30)[1]) if tests else set()


# ---- the command


def copy_tree(tree: Path) -> Path:
    """Copies what git knows, or would, into a tree of its own."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    shutil.rmtree(tree, ignore_errors=True)
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    subprocess.run([sys.executable, "-m", "compileall", "-q", "src", "tests"], cwd=tree, check=True)
    return tree


def make_map(tree: Path, name: str, tests: Sequence[str]) -> None:
    """Runs tests once, in the copy, and writes down which lines each of them executes."""
    arguments = ["-q", "-p", "scripts.line_map", "-p", "no:cacheprovider", "--ignore=tests/gpu", *tests]
    arguments += ["-n", str(AT_ONCE), "--dist", "loadfile", "--no-loadscope-reorder"]
    paths = {"PYTHONPATH": os.pathsep.join([str(tree / "src"), str(tree)]), "PIXTUNE_LINE_MAP": str(MAPS / name)}
    subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=tree, env={**os.environ, **ONE_BY_ONE, **paths})


def import_libraries() -> None:
    """Imports what tests import besides pixtune, so that forked processes have it."""
    os.environ |= ONE_BY_ONE
    preloaded = (ROOT / "tests" / "preloaded.py").read_text()
    for name in (
        "pytest",
        "torch._dynamo",
        "torch._inductor.compile_fx",
        *re.findall(r'^    "([\w.]+)",$', preloaded, re.MULTILINE),
    ):
        if not name.startswith(("pixtune", "tests")):  # which each tree has of its own
            importlib.import_module(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--budget", type=float, default=60, help="seconds of tests a mutant, as long as they took once")
    parser.add_argument("--again", action="store_true", help="judge the seed's survivors again, by today's tests")
    parser.add_argument("--map", nargs="+", metavar="TEST", help="only add these tests to the map")
    arguments = parser.parse_args()
    trees = [copy_tree(WORK / f"tree-{number}") for number in range(AT_ONCE)]
    for tree in trees:
        FREE_TREES.put(tree)
    if arguments.map:
        make_map(trees[0], f"added-{time.time():.0f}", arguments.map)
        return
    if not any(MAPS.glob("*/tests-*.json")):  # which a map has that was finished
        make_map(trees[0], "suite", [])
    tests = ExecutingTests(map(LineMap.load, sorted(MAPS.iterdir())))
    pool, left_out = all_mutations(tests)
    on_gpu = Counter(file for (file, _), several in pool.items() if left_out.issuperset((file, m) for m in several))
    print(f"{len(pool)} lines can be mutated; {on_gpu.total()} only on a GPU, which are left out: {dict(on_gpu)}")
    drawn = draw(pool, arguments.seed)
    mutants = [*islice((each for each in drawn if each not in left_out), arguments.count)]
    print(f"{drawn.index(mutants[-1]) + 1 - len(mutants)} were drawn and left out before the last of {len(mutants)}")
    report = WORK / f"seed-{arguments.seed}.jsonl"
    judged = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    known = {(v["file"], v["line"], *v["diff"]): v for v in judged}
    import_libraries()

    def verdicts(again: Callable[[dict[str, Any]], bool]) -> Iterator[dict[str, Any]]:
        keys = {mutant: key_of(*mutant) for mutant in mutants}
        to_judge = [mutant for mutant, key in keys.items() if key not in known or again(known[key])]
        trials: dict[Future[dict[str, Any]], Mutant] = {}
        with ProcessPoolExecutor(AT_ONCE, multiprocessing.get_context("fork")) as judges:
            for mutant in to_judge:
                ordered = tests.of(*mutant)
                chosen = within_budget(ordered, tests.seconds, arguments.budget)
                trials[judges.submit(judge, *mutant, chosen, len(ordered))] = mutant
            for trial in as_completed(trials):
                known[keys[trials[trial]]] = verdict = trial.result()
                with report.open("a") as stream:
                    stream.write(json.dumps(verdict) + "\n")
                print(f"{mutants.index(trials[trial]) + 1:3} {shown(verdict)}", flush=True)
        return (known[key] for key in keys.values())

    judged_now = [*verdicts(lambda verdict: arguments.again and verdict["verdict"] in SURVIVED)]
    killers = {v["by"] for v in judged_now if v["verdict"] == "killed" and "::" in v["by"]}
    unsound = fail_anyway(trees[0], sorted(killers))
    print(f"{len(unsound)} tests fail without a mutation too, and judge no more: {sorted(unsound)}")
    for test in unsound:
        del tests.seconds[test]
    judged_now = [*verdicts(lambda verdict: verdict.get("by") in unsound)]
    print("\nSurvivors:", *(shown(v) for v in judged_now if v["verdict"] in SURVIVED), sep="\n")
    print(dict(Counter(verdict["verdict"] for verdict in judged_now)))


def shown(verdict: dict[str, Any]) -> str:
    """Returns a verdict as a line, and the mutation below it."""
    head = f"{verdict['verdict']}: {verdict['file']}:{verdict['line']} {verdict['kind']}"
    told = f"by {verdict['by']}" if verdict.get("by") else f"{verdict.get('tests')} of {verdict.get('of')} tests"
    return "\n      ".join([f"{head}; {told}, {verdict.get('seconds', 0)} s", *verdict["diff"]])


if __name__ == "__main__":
    main()
