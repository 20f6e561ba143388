"""The newest checkpoint is told by descent: by hand-made folders, and by random histories beside a plain model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixtune.storage.lineage import (
    Lineage,
    Saved,
    Session,
    SetBack,
    descend,
    next_serial,
    put_in_order,
    read_lineage,
)


def saved(step: int, lineage: Lineage | None = None) -> Saved:
    """Without a lineage: as version 0.1.0 saved."""
    return Saved(Path(f"checkpoint-{step:06d}"), step, lineage or read_lineage(None, step))


def chain(first_serial: int, parent: Lineage | None, name: str, *steps: int) -> list[Saved]:
    """What one session saves after the steps."""
    session, found = Session(name, 0), []
    for serial, step in enumerate(steps, first_serial):
        parent = descend(parent, session, step, serial)
        found.append(saved(step, parent))
    return found


def steps_of(order: tuple[Saved, ...]) -> list[int]:
    return [each.step for each in order]


def test_a_lineage_survives_json() -> None:
    session = Session("b", 0, {"data": "d", "num_processes": 2}, ("seed: was 1, is 2",))
    lineage = descend(descend(None, Session("a", 0), 5, 7), session, 9, 8)
    assert read_lineage(json.loads(json.dumps(lineage.to_dict())), 9) == lineage
    assert (lineage.run, lineage.name, lineage.parent, lineage.serial) == ("a", "b-9", "a-5", 8)
    assert [(each.name, each.last_step) for each in lineage.sessions] == [("a", 5), ("b", 9)]


@pytest.mark.parametrize("values", [{}, {"sessions": [{"nam": 1}], "parent": None, "serial": 1}, {"sessions": 3}])
def test_other_values_are_no_lineage(values: dict[str, object]) -> None:
    with pytest.raises((KeyError, TypeError)):
        read_lineage(values, 1)


def test_without_a_set_back_the_newest_is_the_highest_step() -> None:
    order = put_in_order(chain(1, None, "a", 3, 6, 9))
    assert (steps_of(order.course), order.given_up) == ([9, 6, 3], ())
    assert put_in_order([]) == put_in_order([], SetBack("checkpoint-000003", (), 9))


def test_what_version_0_1_0_saved_is_ordered_by_step_and_gives_way_to_what_descends_from_it() -> None:
    old = [saved(step) for step in (5, 10, 15)]
    assert steps_of(put_in_order(old).course) == [15, 10, 5]
    order = put_in_order([*old, *chain(1, old[1].lineage, "a", 12)])
    assert (steps_of(order.course), steps_of(order.given_up)) == ([12, 10, 5], [15])


def test_set_back_and_saved_below_what_is_given_up() -> None:
    first = chain(1, None, "a", 5, 10)
    order = put_in_order([*first, *chain(3, first[0].lineage, "b", 7)])
    assert (steps_of(order.course), steps_of(order.given_up)) == ([7, 5], [10])


def test_set_back_and_nothing_saved_yet() -> None:
    first = chain(1, None, "a", 5, 10)
    order = put_in_order(first, SetBack("checkpoint-000005", first[0].lineage.sessions, 2))
    assert (steps_of(order.course), steps_of(order.given_up)) == ([5], [10])


def test_what_is_given_up_does_not_come_back_when_the_newest_is_gone() -> None:
    first = chain(1, None, "a", 5, 10)
    back = SetBack("checkpoint-000005", first[0].lineage.sessions, 2)
    assert steps_of(put_in_order([*first, *chain(3, first[0].lineage, "b", 7)], back).course) == [7, 5]
    assert steps_of(put_in_order(first, back).course) == [5]
    assert put_in_order(first[1:], back).course == (), "neither is the last one that is left"


def test_an_older_set_back_does_not_count_beside_later_saves() -> None:
    first = chain(1, None, "a", 5, 10)
    second = chain(3, first[0].lineage, "b", 7, 9)
    back = SetBack("checkpoint-000005", first[0].lineage.sessions, 2)
    third = chain(5, second[0].lineage, "c", 8)
    order = put_in_order([*first, *second, *third], back)
    assert (steps_of(order.course), steps_of(order.given_up)) == ([8, 7, 5], [9, 10])


def test_the_chain_may_have_gaps() -> None:
    first = chain(1, None, "a", 5, 10)
    second = chain(3, first[0].lineage, "b", 7)
    assert steps_of(put_in_order([first[1], *second]).course) == [7], "step 5 was deleted"


def test_serial_numbers_grow_whatever_the_clock_says() -> None:
    first = chain(100, None, "a", 5)
    assert next_serial(first, None, None, 7) == 101
    assert next_serial(first, SetBack("x", (), 300), first[0].lineage, 7) == 301
    assert next_serial([], None, descend(None, Session("a", 0), 3, 500), 7) == 501
    assert next_serial(first, None, None, 10_000) == 10_000


@settings(max_examples=150)
@given(st.data())
def test_random_histories_end_where_a_plain_model_says(data: st.DataObject) -> None:
    """The model: a list of the steps of the course, which is cut where the run is set back."""
    folder: dict[int, Saved] = {}  # one folder a step, as on disk
    back: SetBack | None = None
    course: list[int] = []
    for number in range(data.draw(st.integers(1, 12), "sessions")):
        resumable = [step for step in course if step in folder]
        by_name = data.draw(st.none() | st.sampled_from(sorted(folder))) if folder else None  # given up or not
        if by_name is not None:
            start, parent = by_name, folder[by_name].lineage
            expected = [step for step in course if step <= start] if start in course else None
            sessions = parent.sessions
            course = sorted(each.step for each in folder.values() if each.led_to(sessions))
            if expected is not None:
                assert course == [step for step in expected if step in folder]
            last = max(each.lineage.serial for each in folder.values())
            back = SetBack(folder[start].path.name, sessions, last)
        elif resumable:
            start, parent = resumable[-1], folder[resumable[-1]].lineage
        elif folder:
            break  # all of the course is gone: a user must choose
        else:
            start, parent = 0, None
        session = Session(f"s{number}", start)
        step = start
        for ahead in data.draw(st.lists(st.integers(1, 4), max_size=3), "steps"):  # none: killed before it saved
            step += ahead
            clock = data.draw(st.integers(0, 50), "clock")
            parent = descend(parent, session, step, next_serial(folder.values(), back, parent, clock))
            folder[step] = saved(step, parent)
            course = [*(each for each in course if each < step), step]
        if course and data.draw(st.integers(0, 4), "damage") == 4:
            folder.pop(course[-1], None)  # damaged or deleted
        found = put_in_order(list(folder.values()), back)
        assert steps_of(found.course) == sorted((each for each in course if each in folder), reverse=True)
        assert {each.step for each in found.all} == set(folder) and len(found.all) == len(folder)
