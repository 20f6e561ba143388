"""scripts/mutants.py: what is mutated, what is left alone, what is drawn, and which tests are tried first."""

from __future__ import annotations

import ast
import importlib
from types import ModuleType

import pytest

from tests.runs import ROOT

SOURCE = '''"""A text with < and 1."""

LIMIT = 3


def middle(values, start=0, *, names=("a", "b")):
    """Returns < nothing."""
    assert start >= 0
    total: Literal["x"] = start
    if total < LIMIT and values:
        total += max(values["first"], len(names))
    log.info("%s of %d", total, 5)
    if not values:
        raise ValueError(f"{1 + 1} of {start}")
    store.total = total
    return sorted(values, key=str)[1:]
'''
EXPECTED = """\
LIMIT = 4|LIMIT = 2
def middle(values, start=1, *, names=("a", "b")):
if total <= LIMIT and values:|if total > LIMIT and values:|if (total < LIMIT or values):
if total < LIMIT:|if values:
total -= max(values["first"], len(names))|pass
total += min(values['first'], len(names))|total += max(len(names), values['first'])
total += max(values['first_'], len(names))
pass
if values:
pass
pass
return None
return list(values)[1:]|return sorted(values)[1:]|return sorted(values, key=str)[2:]
return sorted(values, key=str)[0:]|return sorted(values, key=str)[:]
"""
"""By hand: every other line that there may be, several kinds of one line on one."""


@pytest.fixture
def mutations(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("mutations")


@pytest.fixture
def mutants(mutations: ModuleType) -> ModuleType:
    return importlib.import_module("mutants")


@pytest.fixture
def executing_tests(mutations: ModuleType) -> ModuleType:
    return importlib.import_module("executing_tests")


def changed(before: str, after: str) -> str:
    """The one line in which two texts of as many lines differ, in one spelling."""
    pairs = zip(before.splitlines(), after.splitlines(), strict=True)
    (line,) = [new for old, new in pairs if old != new]
    return spelled(line)


def spelled(line: str) -> str:
    return line.strip().replace('"', "'").replace("(total < LIMIT or values)", "total < LIMIT or values")


def test_every_mutation_of_meaning_is_listed_and_no_other(mutations):
    found = [changed(SOURCE, m.apply(SOURCE)) for m in mutations.mutations_of(SOURCE)]
    expected = [spelled(line) for row in EXPECTED.splitlines() for line in row.split("|")]
    assert sorted(found) == sorted(expected)


def test_mutants_are_other_programs(mutations):
    for mutation in mutations.mutations_of(SOURCE):
        assert ast.dump(ast.parse(mutation.apply(SOURCE))) != ast.dump(ast.parse(SOURCE))


def test_letters_of_several_bytes_shift_nothing(mutations):
    source = 'def f(a):\n    return "é≤", a + 1\n'
    assert [m.apply(source).splitlines()[1] for m in mutations.mutations_of(source)] == [
        "    return None",
        '    return "é≤", (a - 1)',
        '    return "é≤", a + 0',
        '    return "é≤", a + 2',
    ]


def test_a_mutation_knows_where_it_is_executed(mutations):
    by_text = {changed(SOURCE, m.apply(SOURCE)): m for m in mutations.mutations_of(SOURCE)}
    assert by_text["LIMIT = 4"].names == ("LIMIT",) and not by_text["LIMIT = 4"].lines
    assert by_text["if values:"].lines in ((10,), (13,))
    default = by_text["def middle(values, start=1, *, names=('a', 'b')):"]
    assert default.lines == tuple(range(7, 17)), "a default has its effect in the function"


def test_a_seed_puts_all_lines_into_the_same_order_each_time(mutants, mutations):
    pool = {("a.py", line): [mutations.Mutation(line, kind, 0, 0, "") for kind in "xyz"] for line in range(100)}
    drawn = mutants.draw(pool, 7)
    assert drawn == mutants.draw(dict(reversed(pool.items())), 7) != mutants.draw(pool, 8)
    assert sorted(mutation.line for _, mutation in drawn) == [*range(100)]
    assert {mutation.kind for _, mutation in drawn} == set("xyz")


def test_lines_that_only_a_gpu_executes(mutants):
    source = "def a():\n    torch.cuda.sync()\n    return 1\n\n\ndef b():\n    return 2\n"
    assert mutants.gpu_lines(source, executed=set()) == {1, 2, 3}
    assert mutants.gpu_lines(source, executed={3}) == {1, 2}


def test_own_tests_come_first_and_no_file_has_two_turns_before_another_has_one(executing_tests):
    seconds = {
        "tests/b.py::1": 1.0,
        "tests/b.py::2": 0.1,
        "tests/c.py::1": 3.0,
        "tests/unit/plan/test_choice.py::1": 9.0,
    }
    own = executing_tests.own_tests("plan/choice.py")
    assert executing_tests.in_turn(seconds, seconds, own) == [
        "tests/unit/plan/test_choice.py::1", "tests/b.py::2", "tests/c.py::1", "tests/b.py::1",
    ]  # fmt: skip
    assert executing_tests.own_tests("train.py") == "tests/unit/test_train"


def test_as_many_tests_as_fit_into_the_time(mutants):
    seconds = {"a": 5.0, "b": 60.0, "c": 4.0, "d": 3.0}
    assert [*mutants.within_budget(["a", "b", "c", "d"], seconds, 10.0).items()] == [("a", 5.0), ("c", 4.0)]
