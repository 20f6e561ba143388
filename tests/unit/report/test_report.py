"""`report.html` and `before_after.png`: right figures, nothing loaded from outside, missing parts said."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from pixtune.progress import in_words
from pixtune.report.charts import Chart, Series, log_axis, render_chart, step_axis, tick_labels, value_axis
from pixtune.report.pictures import data_uri, edge_for, font_for, open_picture, own_font, spread, wrap
from pixtune.report.record import read_record, smooth, thin
from pixtune.report.values import format_seconds
from pixtune.report.write import write_report

RED, BLUE = (220, 20, 20), (20, 20, 220)
NASTY = "<script>alert(\"1\")</script> & 'x' </title>"
VOID = {"meta", "img", "br", "link", "input"}
CONFIG = {"rank": 16, "learning_rate": 3e-4, "pin_memory": None, "samples": {"prompts": ["a fox"], "seeds": [7]}}
PLAN = {
    "weights_format": "bf16",
    "recompute": False,
    "expected_peak_bytes": 45 * 2**30,
    "reasons": ["recomputation off: 45.0 GiB < 72.1 GiB usable"],
}


# ---- a run to report on


@dataclass
class FakeRun:
    """Writes the log that a run would leave."""

    folder: Path
    lines: list[dict[str, Any]] = field(default_factory=list)

    def steps(self, first: int, last: int, **changed: float) -> None:
        for step in range(first, last + 1):
            values = {
                "loss": 0.5 - 0.0005 * step, "grad_norm": 0.1, "learning_rate": 3e-4, "seconds": 0.25,
                "peak_memory_gib": 44.812,
            }  # fmt: skip
            self.lines.append({"kind": "step", "step": step, **values, **changed})

    def validation(self, step: int, *quarters: float) -> None:
        self.lines.append(
            {"kind": "validation", "step": step, "loss": sum(quarters) / 4, "quarters": list(quarters)},
        )

    def sample(
        self,
        step: int,
        color: tuple[int, int, int],
        prompt: str = "a fox",
        size: tuple[int, int] = (128, 128),
        **apart: object,
    ) -> Path:
        number = sum(line["kind"] == "sample" and line["step"] == step for line in self.lines)
        path = self.folder / "samples" / f"step-{step:06d}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, color).save(path)
        relative = path.relative_to(self.folder).as_posix()
        self.lines.append({"kind": "sample", "step": step, "prompt": prompt, "seed": 7, "path": relative, **apart})
        return path

    def report(self, **changed: Mapping[str, Any]) -> Page:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        parts: dict[str, Any] = {
            "config": CONFIG,
            "plan": PLAN,
            "versions": {"torch": "2.15.0"},
            "facts": {},
            **changed,
        }
        path = write_report(self.folder, **parts)
        assert path == self.folder / "report.html"
        return Page.parse(path.read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    return FakeRun(tmp_path / "my-run")


@pytest.fixture
def whole_run(run: FakeRun) -> FakeRun:
    """100 steps, three validations, two prompts drawn at three steps."""
    for step, color, quarters in ((0, RED, (0.6, 0.2, 0.1, 0.3)), (50, RED, (0.6, 0.18, 0.08, 0.2))):
        run.validation(step, *quarters)
        for prompt in ("a fox", "a bear"):
            run.sample(step, color, prompt)
    run.steps(1, 100)
    run.validation(100, 0.54, 0.15, 0.05, 0.16)
    for prompt in ("a fox", "a bear"):
        run.sample(100, BLUE, prompt)
    return run


# ---- a page to look into


@dataclass
class Element:
    """An element with its attributes, elements and text."""

    name: str
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text inside, with single spaces."""
        return " ".join(" ".join(self.texts).split())

    def find(self, name: str, css_class: str | None = None) -> list[Element]:
        """Elements inside, by tag and class."""
        inside = [self] if self.name == name and css_class in (None, *self.attributes.get("class", "").split()) else []
        return inside + [found for child in self.children for found in child.find(name, css_class)]


class Page(HTMLParser):
    """A strict reader: every opened element is closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = source
        self.open = [Element("document", {})]

    @classmethod
    def parse(cls, source: str) -> Page:
        page = cls(source)
        page.feed(source)
        page.close()
        assert [element.name for element in page.open] == ["document"]
        return page

    @property
    def root(self) -> Element:
        return self.open[0]

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        element = Element(tag, {key: value or "" for key, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.texts.append(data)

    # what the page says

    def tile(self, title: str) -> str:
        (block,) = [e for e in self.root.find("dl", "tiles")[0].find("div") if e.find("dt")[0].text == title]
        return " | ".join(value.text for value in block.find("dd"))

    def chart(self, title: str) -> Element:
        (figure,) = [e for e in self.root.find("figure", "chart") if e.find("b")[0].text == title]
        return figure

    def rows(self, kind: str) -> dict[str, str]:
        tables = self.root.find("table", kind)
        return {row.find("th")[0].text: row.find("td")[0].text for table in tables for row in table.find("tr")}


def num_points(path: Element) -> int:
    return len(re.findall("[ML]", path.attributes["d"]))


# ---- what it says


def test_the_head_gives_the_outcome_and_its_figures(whole_run: FakeRun) -> None:
    page = whole_run.report()
    assert page.root.find("h1")[0].text == "my-run"
    assert page.root.find("p", "outcome")[0].text == "Held-out loss 0.3000 → 0.2250 (−25.0%)"
    assert page.root.find("span", "good") and not page.root.find("span", "bad")
    assert page.tile("Steps") == "100"
    assert page.tile("Time in steps") == "25.0 s | without validation and samples"
    assert page.tile("Time of a step") == "0.25 s | median"
    assert page.tile("Peak GPU memory") == "44.8 GiB | the plan expected 45.0 GiB"


def test_the_slow_first_step_does_not_move_the_median(run: FakeRun) -> None:
    run.steps(1, 1, seconds=60.0, peak_memory_gib=50.0)
    run.steps(2, 10)
    page = run.report()
    assert page.tile("Time of a step") == "0.25 s | median"
    assert page.tile("Time in steps").startswith("1 min 2 s")
    assert page.tile("Peak GPU memory").startswith("50.0 GiB")


def test_a_loss_that_rose_is_said_with_the_better_step(run: FakeRun) -> None:
    for step, loss in ((0, 0.2), (10, 0.15), (20, 0.25)):
        run.validation(step, *[loss] * 4)
    head = run.report().root.find("header")[0]
    assert head.find("span", "bad")[0].text == "(+25.0%)"
    assert "0.1500 at step 10" in head.text


def test_the_held_out_loss_is_the_one_to_watch_where_there_is_one(run: FakeRun) -> None:
    run.steps(1, 3)
    assert "one to watch" not in run.report().source
    run.validation(3, *[0.2] * 4)
    assert "one to watch" in run.report().source


def test_no_better_step_is_named_when_the_last_is_best(whole_run: FakeRun) -> None:
    assert "lowest" not in whole_run.report().root.find("header")[0].text


def test_a_cpu_run_shows_no_gpu_memory(run: FakeRun) -> None:
    run.steps(1, 3, peak_memory_gib=0.0)
    assert "GPU memory" not in run.report().source


# ---- speed and memory

STAGES = (
    ("text encoding", 31.2, 0.01, 15.9, 16.2, 9.1),
    ("training steps", 3725.0, 20.9, 21.9, 22.3, 5.25),
)


def memory_line(on_gpu: bool) -> dict[str, Any]:
    rows = [
        {
            "stage": stage, "seconds": seconds, "allocated_gib": now * on_gpu, "reserved_gib": now * on_gpu,
            "peak_gib": peak * on_gpu, "peak_reserved_gib": reserved * on_gpu, "host_rss_gib": host,
        }
        for stage, seconds, now, peak, reserved, host in STAGES
    ]  # fmt: skip
    compared = {"expected_peak_gib": 21.5, "measured_peak_gib": 22.3, "reserved_peak_gib": 22.7, "error_percent": -3.6}
    return {"kind": "memory", "step": 3, "stages": rows, **(compared if on_gpu else {})}


def test_memory_stands_by_stage_beside_the_plan(run: FakeRun) -> None:
    run.steps(1, 3)
    run.lines.append({**memory_line(on_gpu=True), "process_peak_gib": 23.1})
    page = run.report()
    (section,) = [s for s in page.root.find("section") if s.find("h2")[0].text == "Memory"]
    assert section.find("p")[0].text == (
        "The plan expected 21.5 GiB at the peak of a step; it was 22.3 GiB, so the estimate was off by −3.6%. "
        "Torch's allocator reserved 22.7 GiB; the whole process, CUDA included, took 23.1 GiB."
    )
    heads, *rows = [[cell.text for cell in row.children] for row in section.find("tr")]
    assert heads == ["stage", "GPU, peak", "reserved, peak", "GPU, at its end", "host, at its end", "time"]
    assert rows[1] == ["training steps", "21.90 GiB", "22.30 GiB", "20.90 GiB", "5.25 GiB", "1 h 2 min"]


def test_a_cpu_run_shows_the_hosts_memory_alone(run: FakeRun) -> None:
    run.steps(1, 3, peak_memory_gib=0.0)
    run.lines.append(memory_line(on_gpu=False))
    page = run.report()
    heads, *rows = [[cell.text for cell in row.children] for row in page.root.find("table", "memory")[0].find("tr")]
    assert heads == ["stage", "host, at its end", "time"]
    assert rows == [["text encoding", "9.10 GiB", "31.2 s"], ["training steps", "5.25 GiB", "1 h 2 min"]]
    assert "GPU" not in page.source and "The plan expected" not in page.source


def test_a_run_that_has_not_finished_has_no_memory_section(whole_run: FakeRun) -> None:
    page = whole_run.report()
    assert not {"Memory", "Slower steps"} & {head.text for head in page.root.find("h2")}


def test_the_first_step_and_slower_steps_are_told(run: FakeRun) -> None:
    for step, seconds, graphs in ((1, 74.2, 6), (51, 60.0, 6)):
        run.lines.append({"kind": "first_step", "step": step, "first_step_seconds": seconds, "compiled_graphs": graphs})
    run.steps(1, 100)
    run.lines.append({"kind": "drift", "step": 60, "ratio": 1.8, "causes": ["data"], "message": f"step 60: {NASTY}"})
    page = run.report()
    assert page.tile("First step") == "74.2 s | with 6 graphs compiled"
    assert [item.text for item in page.root.find("ul", "drifts")[0].find("li")] == [
        " ".join(f"step 60: {NASTY}".split())
    ]


def test_what_failed_in_the_run_is_listed(run: FakeRun) -> None:
    run.steps(1, 3)
    messages = [f"samples failed at step 2: {NASTY}", "the held-out loss failed at step 2: out of memory"]
    run.lines += [{"kind": "problem", "step": 2, "service": "x", "message": message} for message in messages]
    page = run.report()
    assert "What failed" in {head.text for head in page.root.find("h2")}
    items = [item.text for item in page.root.find("ul", "drifts")[0].find("li")]
    assert items == [" ".join(message.split()) for message in messages]


def test_tables_hold_facts_plan_config_and_versions(whole_run: FakeRun) -> None:
    page = whole_run.report(facts={"LoRA layers": 240, "trained parameters": 23592960})
    plain, code = page.rows("plain"), page.rows("code")
    assert plain["trained parameters"] == "23,592,960"
    plan = {key: code.pop(key) for key in ("weights format", "recompute", "expected peak")}
    assert plan == {"weights format": "bf16", "recompute": "no", "expected peak": "45.00 GiB"}
    assert page.root.find("ul", "reasons")[0].text == PLAN["reasons"][0]  # type: ignore[index]
    assert code == {
        "rank": "16", "learning_rate": "0.0003", "pin_memory": "null", "samples.prompts": "- a fox",
        "samples.seeds": "- 7", "torch": "2.15.0",
    }  # fmt: skip


def test_held_out_figures_stand_in_a_table_by_quarter(whole_run: FakeRun) -> None:
    (table,) = whole_run.report().root.find("table", "figures")
    heads, *rows = [[cell.text for cell in row.children] for row in table.find("tr")]
    assert heads == ["step", "all", "nearly clean [0, 1/4)", "[1/4, 1/2)", "[1/2, 3/4)", "nearly noise [3/4, 1]"]
    assert rows[0] == ["0", "0.3000", "0.6000", "0.2000", "0.1000", "0.3000"]
    assert [row[0] for row in rows] == ["0", "50", "100"]


def test_the_head_says_what_was_trained_and_how(run: FakeRun) -> None:
    run.steps(1, 3)
    config = {"pretrained_model_name_or_path": NASTY, "method": "lora", "rank": 8, "learning_rate": 1e-4}
    head = run.report(config=config).root.find("header")[0].find("p")[0].text
    assert head.startswith(" ".join(NASTY.split())) and "LoRA of rank 8, learning rate 0.0001, " in head
    assert (
        "written " in head and "rank" not in run.report(config={**config, "method": "full"}).root.find("header")[0].text
    )


def test_a_run_on_its_way_says_how_far_it_is(run: FakeRun) -> None:
    run.steps(1, 25)
    assert run.report(num_steps=200).tile("Steps so far") == "25 | of 200"  # type: ignore[arg-type]
    assert run.report(num_steps=25).tile("Steps") == "25"  # type: ignore[arg-type]


# ---- charts


def test_every_chart_draws_all_its_points(whole_run: FakeRun) -> None:
    page = whole_run.report()
    titles = [figure.find("b")[0].text for figure in page.root.find("figure", "chart")]
    assert titles == [
        "Training loss", "Held-out loss", "Held-out loss by sigma", "Gradient norm", "Learning rate", "Time of a step",
    ]  # fmt: skip
    for title in ("Training loss", "Gradient norm"):
        drawing = page.chart(title).find("svg")[-1]
        assert [num_points(path) for path in drawing.find("path", "dots")] == [100]
        assert [num_points(path) for path in drawing.find("path", "line")] == [100]
    for title in ("Learning rate", "Time of a step"):
        assert [num_points(path) for path in page.chart(title).find("path", "line")] == [100]
    held_out = page.chart("Held-out loss")
    assert [mark.find("title")[0].text for mark in held_out.find("path", "mark")] == [
        "held-out, step 0: 0.3", "held-out, step 50: 0.265", "held-out, step 100: 0.225",
    ]  # fmt: skip


def test_quarters_are_drawn_as_change_since_the_first(whole_run: FakeRun) -> None:
    figure = whole_run.report().chart("Held-out loss by sigma")
    marks = [mark.text for mark in figure.find("svg")[-1].find("path", "mark")]
    assert len(marks) == 12
    assert "nearly clean [0, 1/4), step 100: −10%" in marks
    assert "[1/2, 3/4), step 100: −50%" in marks
    assert [entry.text for entry in figure.find("li")] == [
        "nearly clean [0, 1/4)", "[1/4, 1/2)", "[1/2, 3/4)", "nearly noise [3/4, 1]",
    ]  # fmt: skip


def test_charts_are_told_in_words_and_stay_inside_their_frame(whole_run: FakeRun) -> None:
    for figure in whole_run.report().root.find("figure", "chart"):
        drawing = figure.find("svg")[-1]
        assert drawing.attributes["role"] == "img" and "at step 100" in drawing.attributes["aria-label"]
        _, _, width, height = map(float, drawing.attributes["viewbox"].split())
        for path in drawing.find("path", "line"):
            for x, y in re.findall(r"([\d.-]+) ([\d.-]+)", path.attributes["d"]):
                assert 0 <= float(x) <= width and 0 <= float(y) <= height


def test_higher_values_are_drawn_higher() -> None:
    drawing = Page.parse(render_chart(Chart("t", "s", [Series("x", [(0, 1.0), (5, 3.0), (10, 2.0)], 0)], 10)))
    (path,) = drawing.root.find("path", "line")
    places = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", path.attributes["d"])]
    assert places[0][0] < places[1][0] < places[2][0]
    assert places[1][1] < places[2][1] < places[0][1]
    assert (places[0][1] + places[1][1]) / 2 == pytest.approx(places[2][1], abs=0.1)


def test_thousands_of_steps_are_thinned_and_keep_extremes(run: FakeRun) -> None:
    run.steps(1, 5000)
    run.lines[3210]["loss"], run.lines[1234]["loss"] = 0.93, 0.0011
    page = run.report()
    paths = page.chart("Training loss").find("svg")[-1].find("path")
    assert max(map(num_points, paths)) == 800
    assert len(page.source) < 200_000


def test_thin_keeps_ends_and_extremes() -> None:
    points = [(step, float(step % 7)) for step in range(10_000)]
    points[4321] = (4321, 99.0)
    points[8765] = (8765, -99.0)
    thinned = thin(points, 800)
    assert len(thinned) <= 800 and thinned == sorted(thinned)
    assert {points[0], points[-1], points[4321], points[8765]} <= set(thinned)
    assert thin(points[:800], 800) == points[:800]


def test_smooth_is_a_centred_mean() -> None:
    points = [(step, float(step)) for step in range(9)]
    assert smooth(points, 3)[1:-1] == points[1:-1]
    assert smooth(points, 3)[0] == (0, 0.5) and smooth(points, 3)[-1] == (8, 7.5)
    assert smooth([(1, 0.0), (2, 9.0), (3, 0.0)], 3)[1] == (2, 3.0)


@pytest.mark.parametrize(
    ("values", "from_zero", "ticks"),
    [
        ([0.2393, 0.2851], False, [0.23, 0.24, 0.25, 0.26, 0.27, 0.28, 0.29]),
        ([0.0, 3e-4], True, [0.0, 1e-4, 2e-4, 3e-4]),
        ([0.36, 1.9], True, [0.0, 0.5, 1.0, 1.5, 2.0]),
        ([-41.0, 0.0], False, [-50.0, -40.0, -30.0, -20.0, -10.0, 0.0]),
        ([0.0, 0.0], False, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ],
)
def test_value_axis_has_round_ticks_around_the_values(values: list[float], from_zero: bool, ticks: list[float]) -> None:
    axis = value_axis(values, from_zero)
    assert list(axis.ticks) == pytest.approx(ticks)
    assert not axis.log and axis.share(axis.low) == 0 and axis.share(axis.high) == 1


@pytest.mark.parametrize("value", [1e-9, 0.3, 1.0, 12345.0, -2.0])
def test_one_value_gets_an_axis_around_it(value: float) -> None:
    axis = value_axis([value, value], False)
    assert axis.low < value < axis.high
    assert len(set(tick_labels(axis.ticks))) == len(axis.ticks)


@pytest.mark.parametrize(("low", "high"), [(0.012, 0.9), (1.0, 100.0), (3e-5, 7e4), (0.002, 0.2)])
def test_log_axis_holds_the_values_and_has_few_round_ticks(low: float, high: float) -> None:
    axis = log_axis(low, high)
    assert axis.low <= low and high <= axis.high
    assert 2 <= len(axis.ticks) <= 7
    assert all(0 <= axis.share(tick) <= 1 for tick in axis.ticks)
    assert all(f"{tick:e}"[:8] in ("1.000000", "2.000000", "5.000000") for tick in axis.ticks)


def test_values_over_orders_of_magnitude_get_a_log_axis() -> None:
    assert value_axis([0.01, 5.0], False).log
    assert not value_axis([0.01, 5.0], True).log and not value_axis([0.0, 5.0], False).log


@pytest.mark.parametrize("last_step", [1, 2, 7, 400, 1999, 123_456])
def test_step_axis_ticks_are_whole_steps_of_the_run(last_step: int) -> None:
    axis = step_axis(last_step)
    assert axis.ticks[0] == 0 and axis.ticks[-1] <= last_step and axis.high == last_step
    assert 2 <= len(axis.ticks) <= 7 and all(tick == int(tick) for tick in axis.ticks)
    assert len(set(axis.ticks)) == len(axis.ticks)


def test_tick_labels() -> None:
    assert tick_labels([0.0, 0.25, 0.5]) == ["0.00", "0.25", "0.50"]
    assert tick_labels([0.0, 1e-4, 2e-4]) == ["0", "1e-4", "2e-4"]
    assert tick_labels([0.0, 2000.0, 4000.0]) == ["0", "2,000", "4,000"]
    assert tick_labels([-50.0, 0.0], "%") == ["−50%", "0%"]
    assert tick_labels([0.1, 1.0, 10.0]) == ["0.1", "1", "10"]


# ---- safe and self-contained


def test_text_from_outside_is_escaped_everywhere(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "a<i>b&c")
    run.sample(0, RED, NASTY)
    run.sample(5, RED, NASTY)
    run.sample(10, BLUE, NASTY).unlink()
    run.lines[-1]["path"] = NASTY
    page = run.report(
        config={NASTY: {"x": NASTY, "list": [NASTY]}},
        plan={NASTY: NASTY, "reasons": [NASTY]},
        versions={NASTY: NASTY},
        facts={NASTY: NASTY},
    )
    names = {element.name for element in walk(page.root)}
    assert not names & {"script", "i", "iframe"}
    assert page.root.find("title")[0].text == "a<i>b&c: pixtune report"
    shown = NASTY.replace("\n", " ")
    assert page.rows("plain")[shown] == shown
    assert page.rows("code")[f"{shown}.list"] == f"- {shown}"
    assert shown in page.root.find("ul", "reasons")[0].text
    assert shown in page.root.find("span", "missing")[0].text
    assert all(shown in image.attributes["alt"] for image in page.root.find("img"))


def test_names_in_a_chart_are_escaped() -> None:
    series = [Series(NASTY, [(0, 1.0), (1, 2.0)], 0, "marked"), Series("b", [(0, 1.0)], 1)]
    drawing = Page.parse(render_chart(Chart(NASTY, NASTY, series, 1))).root
    assert not drawing.find("script")
    assert drawing.find("b")[0].text == NASTY and drawing.find("li")[0].text == NASTY
    assert NASTY in drawing.find("svg")[-1].attributes["aria-label"]


def test_nothing_is_loaded_from_outside(whole_run: FakeRun) -> None:
    page = whole_run.report()
    elements = walk(page.root)
    assert not {element.name for element in elements} & {"script", "link", "iframe", "object", "embed", "base"}
    for element in elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"):
            assert element.attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"https?://|url\(|@import|src=[\"']?//", page.source)
    (policy,) = [e for e in page.root.find("meta") if e.attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy.attributes["content"].startswith("default-src 'none'")


def test_a_broken_letter_in_a_prompt_does_not_stop_the_report(run: FakeRun) -> None:
    run.sample(0, RED, "half \ud83d a letter")
    run.sample(4, BLUE, "half \ud83d a letter")
    assert "half ? a letter" in run.report().source


def walk(element: Element) -> list[Element]:
    return [element] + [inner for child in element.children for inner in walk(child)]


# ---- pictures


def test_samples_are_embedded_by_step(whole_run: FakeRun) -> None:
    page = whole_run.report()
    pairs = page.root.find("div", "pairs")[0].find("figure")
    assert [pair.find("figcaption")[0].text for pair in pairs] == ["a fox seed 7", "a bear seed 7"]
    for pair in pairs:
        before, after = (decode(image) for image in pair.find("img"))
        assert before.getpixel((5, 5)) == RED and after.getpixel((5, 5)) == BLUE
        assert before.size == (128, 128)
        assert [picture.text for picture in pair.find("span", "picture")] == ["before (step 0)", "after (step 100)"]
    strips = page.root.find("ul", "strip")
    assert [[item.text for item in strip.find("li")] for strip in strips] == [["step 0", "step 50", "step 100"]] * 2


def test_two_steps_of_pictures_need_no_strip(run: FakeRun) -> None:
    run.sample(0, RED)
    run.sample(10, BLUE)
    page = run.report()
    assert len(page.root.find("img")) == 2 and not page.root.find("ul", "strip")


def test_each_strength_has_a_row_and_each_step_a_column(run: FakeRun) -> None:
    """Pairs are those of the strength nearest to 1. Another size or negative prompt is another prompt's row."""
    for step in (0, 10):
        for strength in (2.0, 0.5, 1.0):
            run.sample(step, RED if not step else BLUE, strength=strength)
        run.lines.append({**run.lines[-1], "size": [64, 32], "negative": "blurry"})
    page = run.report()
    assert [title.text for title in page.root.find("h3")] == ["a fox seed 7", "a fox seed 7, 64x32, not: blurry"]
    rows = [row.text for row in page.root.find("p", "strength")]
    assert rows == ["strength 0.5", "strength 1", "strength 2", "strength 1"]
    assert [[item.text for item in strip.find("li")] for strip in page.root.find("ul", "strip")] == [
        ["step 0", "step 10"]
    ] * 4
    assert len(page.root.find("div", "pairs")[0].find("figure")) == 2


def test_large_pictures_are_reduced(run: FakeRun) -> None:
    for step in (0, 5, 10):
        run.sample(step, RED, size=(1024, 768))
    page = run.report()
    pair = [decode(image) for image in page.root.find("div", "pair")[0].find("img")]
    strip = [decode(image) for image in page.root.find("ul", "strip")[0].find("img")]
    assert [picture.size for picture in pair] == [(512, 384)] * 2
    assert [picture.size for picture in strip] == [(256, 192)] * 3
    assert pair[0].format == "JPEG"


def test_many_pictures_of_one_prompt_are_thinned_and_the_page_says_so(run: FakeRun) -> None:
    for step in range(300):
        run.sample(step, RED, size=(8, 8))
    page = run.report()
    items = [item.text for item in page.root.find("ul", "strip")[0].find("li")]
    assert items[0] == "step 0" and items[-1] == "step 299" and 100 < len(items) < 300
    assert f"{len(items)} of 300 pictures" in page.root.find("h3")[0].text


def test_embedded_pictures_stay_small_even_if_they_are_noise() -> None:
    photo = Image.effect_noise((1024, 1024), 60).resize((64, 64)).resize((1024, 1024)).convert("RGB")
    assert len(data_uri(photo, 512)) < 512 * 512 * 0.7
    noise = Image.merge("RGB", [Image.effect_noise((256, 256), 90) for _ in range(3)])
    assert len(data_uri(noise, 256)) < 256 * 256 * 1.5
    assert data_uri(photo.resize((128, 128)), 256).startswith("data:image/png")


@pytest.mark.parametrize("way", ["upwards", "at the root", "link", "zero byte", "loop", "bitmap", "bomb"])
def test_only_pictures_of_the_run_are_opened(tmp_path: Path, way: str) -> None:
    """The log may be somebody else's, and the page may be handed on."""
    secret, folder = tmp_path / "secret.png", tmp_path / "run"
    folder.mkdir()
    Image.new("RGB", (8, 8), RED).save(secret)
    Image.new("RGB", (8, 8), RED).save(folder / "good.png")
    Image.new("RGB", (8, 8), RED).save(folder / "bitmap", "BMP")
    Image.new("1", (9000, 9000)).save(folder / "bomb", "PNG")
    (folder / "link").symlink_to(secret)
    (folder / "loop").symlink_to(folder / "loop")
    path = {"upwards": "../secret.png", "at the root": str(secret), "zero byte": "a\0b"}.get(way, way)
    assert open_picture(folder, "good.png") is not None
    assert open_picture(folder, path) is None


def test_a_picture_that_cannot_be_read_is_named_in_its_place(whole_run: FakeRun) -> None:
    folder = whole_run.folder / "samples"
    (folder / "step-000050" / "000.png").unlink()
    whole = (folder / "step-000100" / "001.png").read_bytes()
    (folder / "step-000100" / "001.png").write_bytes(whole[: len(whole) // 2])
    page = whole_run.report()
    said = [missing.text for missing in page.root.find("span", "missing")]
    assert said == [
        f"missing or damaged: samples/step-{name}.png" for name in ("000100/001", "000050/000", "000100/001")
    ]
    assert len(page.root.find("img")) == 4 + 6 - 3
    with Image.open(whole_run.folder / "before_after.png") as grid:
        assert count(grid, RED) == 2 * 256 * 256 and count(grid, BLUE) == 256 * 256


@pytest.mark.parametrize(
    ("size", "tile"),
    [((128, 128), (256, 256)), ((96, 48), (256, 128)), ((320, 400), (320, 400)), ((1024, 768), (512, 384))],
)
def test_before_after_png_is_a_grid_of_readable_pictures(
    run: FakeRun, size: tuple[int, int], tile: tuple[int, int]
) -> None:
    for step, color in ((0, RED), (10, (0, 200, 0)), (20, BLUE)):
        for prompt in ("a fox", "a bear", "a bee"):
            run.sample(step, color, prompt, size)
    run.report()
    width, height = tile
    with Image.open(run.folder / "before_after.png") as grid:
        assert grid.format == "PNG"
        assert grid.size == (24 + 230 + 12 + width + 12 + width + 24, 24 + 40 + 36 + 3 * height + 2 * 12 + 24)
        assert count(grid, RED) == count(grid, BLUE) == 3 * width * height
        assert count(grid, (0, 200, 0)) == 0
        assert grid.getpixel((24 + 230 + 12 + 5, 105)) == RED
        assert grid.getpixel((24 + 230 + 12 + width + 12 + 5, 105)) == BLUE
        for row in range(3):  # each row has its words beside it
            top = 100 + row * (height + 12)
            darkest, _ = grid.crop((24, top, 254, top + height)).convert("L").getextrema()
            assert isinstance(darkest, int) and darkest < 100


def test_before_after_png_has_at_most_sixteen_rows(run: FakeRun) -> None:
    for step, color in ((0, RED), (20, BLUE)):
        for number in range(40):
            run.sample(step, color, f"prompt {number}", (64, 64))
    page = run.report()
    with Image.open(run.folder / "before_after.png") as grid:
        assert count(grid, BLUE) == 16 * 256 * 256
    assert len(page.root.find("img")) == 80


@pytest.mark.parametrize("steps", [(), (0,), (10, 20)])
def test_there_is_no_before_after_without_both(run: FakeRun, steps: tuple[int, ...]) -> None:
    for step in steps:
        run.sample(step, RED)
    run.steps(1, 20)
    page = run.report()
    assert not (run.folder / "before_after.png").exists() and not page.root.find("div", "pairs")
    assert len(page.root.find("img")) == len(steps)


def test_left_out_prompts_are_said(run: FakeRun) -> None:
    for step in (0, 5, 10):
        for number in range(70):
            run.sample(step, RED, f"prompt {number}", (8, 8))
    heads = [head.text for head in run.report().root.find("h2")]
    assert heads[:2] == ["Before and after (60 of 70 pairs)", "Samples by step (60 of 70 prompts and seeds)"]


def test_a_prompt_that_came_later_has_no_pair(run: FakeRun) -> None:
    run.sample(0, RED, "a fox")
    run.sample(10, BLUE, "a fox")
    run.sample(10, BLUE, "a bear")
    page = run.report()
    assert [pair.find("figcaption")[0].text for pair in page.root.find("div", "pairs")[0].find("figure")] == [
        "a fox seed 7"
    ]
    assert len(page.root.find("ul", "strip")) == 2


def decode(image: Element) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(image.attributes["src"].partition("base64,")[2])))


def count(grid: Image.Image, color: tuple[int, int, int]) -> int:
    """Pixels of exactly that colour."""
    difference = ImageChops.difference(grid.convert("RGB"), Image.new("RGB", grid.size, color))
    channels = difference.split()
    largest = ImageChops.lighter(ImageChops.lighter(channels[0], channels[1]), channels[2])
    return largest.histogram()[0]


# ---- words in the picture


def test_wrap_breaks_between_words_and_inside_long_ones() -> None:
    font = own_font(17)
    lines = wrap("a red fox sits in tall grass under a tree", font, 120, most_lines=9)
    assert len(lines) > 2 and " ".join(lines) == "a red fox sits in tall grass under a tree"
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(wrap("x" * 100, font, 120, most_lines=99)) == "x" * 100
    cut = wrap("word " * 500, font, 120, most_lines=3)
    assert len(cut) == 3 and cut[-1].endswith("…")


def test_letters_that_no_font_has_are_noticed() -> None:
    assert font_for("a fox, 7", 17) is not None
    assert font_for("a \U0010fffd fox", 17) is None


def test_a_prompt_in_any_script_makes_a_picture(run: FakeRun) -> None:
    for step in (0, 10):
        run.sample(step, RED, "一只狐狸 \U0010fffd")
    page = run.report()
    assert (run.folder / "before_after.png").exists()
    assert "一只狐狸" in page.root.find("figcaption")[0].text


# ---- missing parts


def test_a_run_without_a_log_has_a_page(run: FakeRun) -> None:
    page = run.report(config={}, plan={}, versions={})
    assert page.root.find("p", "outcome")[0].text == "No held-out pictures were measured."
    assert "No step was logged." in page.root.text
    assert page.tile("Steps") == "0"


def test_one_step_is_drawn_as_one_dot(run: FakeRun) -> None:
    run.steps(1, 1)
    page = run.report()
    assert [num_points(path) for path in page.chart("Training loss").find("path", "dot")] == [1]
    assert page.tile("Time in steps").startswith("0.2 s")
    assert len(page.root.find("figure", "chart")) == 4


def test_one_validation_is_shown_without_a_change(run: FakeRun) -> None:
    run.validation(0, 0.1, 0.2, 0.3, 0.4)
    page = run.report()
    assert page.root.find("p", "outcome")[0].text == "Held-out loss at step 0: 0.2500."
    assert [figure.find("b")[0].text for figure in page.root.find("figure", "chart")] == ["Held-out loss"]


def test_values_that_are_no_number_are_left_out(run: FakeRun) -> None:
    run.steps(1, 10)
    run.lines[4].update(loss=float("nan"), grad_norm=float("inf"))
    run.validation(10, float("nan"), 1, 1, 1)
    page = run.report()
    assert not re.search(r"\b(nan|inf)\b", page.source, re.IGNORECASE)
    assert num_points(page.chart("Training loss").find("path", "line")[0]) == 9
    assert num_points(page.chart("Learning rate").find("path", "line")[0]) == 10


def test_a_zero_first_loss_divides_nothing(run: FakeRun) -> None:
    run.validation(0, 0.0, 0.0, 0.0, 0.0)
    run.validation(5, 0.1, 0.1, 0.1, 0.1)
    assert run.report().root.find("p", "outcome")[0].text == "Held-out loss 0.0000 → 0.1000"


def test_a_step_that_stands_twice_counts_once(run: FakeRun) -> None:
    run.validation(0, *[0.4] * 4)
    run.steps(1, 6)
    run.steps(5, 8, loss=0.9)
    run.validation(0, *[0.2] * 4)
    run.folder.mkdir()
    run.report()
    record = read_record(run.folder)
    assert [step for step, _ in record.series("loss")] == list(range(1, 9))
    assert dict(record.series("loss"))[5] == 0.9
    assert [v.loss for v in record.validations] == [pytest.approx(0.2)]


def test_writing_again_replaces_the_page(whole_run: FakeRun) -> None:
    whole_run.report()
    first = sorted(path.name for path in whole_run.folder.iterdir())
    whole_run.steps(101, 120)
    assert whole_run.report().tile("Steps") == "120"
    assert sorted(path.name for path in whole_run.folder.iterdir()) == first


# ---- small parts


def test_durations_and_seconds_in_words() -> None:
    assert [in_words(value) for value in (0, 59.4, 61, 3600, 93_784)] == [
        "0.0 s", "59.4 s", "1 min 1 s", "1 h 0 min", "26 h 3 min",
    ]  # fmt: skip
    assert [format_seconds(value) for value in (0.00521, 0.3714, 12.345)] == ["5.21 ms", "0.371 s", "12.3 s"]


def test_spread_and_edges() -> None:
    assert spread(range(100), 3) == [0, 50, 99] and spread([1, 2], 5) == [1, 2]
    assert edge_for(4, 10_000, (100, 50)) == 50 and edge_for(1, 10_000, (100, 50)) == 100


def test_edits_of_several_pictures_by_one_prompt_stay_apart(tmp_path: Path) -> None:
    lines = [
        {"kind": "sample", "step": step, "prompt": "make it red", "seed": 0, "path": f"{step}-{name}",
         "controls": [f"controls/{name}"]}
        for step in (0, 5, 5)  # the last line again, as after a crash
        for name in ("cat.png", "dog.png")
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = read_record(tmp_path)
    assert [[sample.path for sample in strip.samples] for strip in record.strips] == [
        ["0-cat.png", "5-cat.png"], ["0-dog.png", "5-dog.png"],
    ]  # fmt: skip
    assert [first.detail for first, _ in record.pairs] == ["seed 0, cat.png", "seed 0, dog.png"]
