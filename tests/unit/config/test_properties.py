"""Whatever a config says within the schema is read as it was written; whatever is wrong in it is one listed error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pixtune.config import load_config, resolved_yaml, to_dict
from pixtune.config.contradictions import contradictions
from pixtune.config.schema import FORMER_KEYS, OLDER_NAMES, TrainConfig, leaf_keys, sections
from pixtune.config.yaml_tree import ConfigDumper
from pixtune.errors import ConfigError

Values = dict[str, Any]
SCHEMA = TrainConfig.model_json_schema()
NEEDED: Values = {
    "pretrained_model_name_or_path": "m", "output_dir": "o", "max_train_steps": 1, "data_config.img_dir": "p",
}  # fmt: skip
SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "lr_step_rules": st.none(),  # another schedule's
    "freeze_text_encoder": st.just(True),  # the other value is refused by name
    "data_config.folders": st.just([]),  # in place of data_config.img_dir, which is given; see test_folders.py
    "lora_files.formats": st.sampled_from([["diffusers"], ["kohya", "diffusers"], ["diffusers", "kohya", "comfyui"]]),
    "samples.strengths": st.lists(  # no two equal ones
        st.floats(-10, 10), min_size=1, max_size=3, unique_by=lambda value: f"{value + 0:g}"
    ),
    "objective.min_sigma": st.floats(0, 0.4),  # below the upper end
    "objective.max_sigma": st.floats(0.5, 1),
    "resume_with_changes_in": st.lists(st.sampled_from(list(leaf_keys())), max_size=3),
}
OF_A_WINDOWS_PATH = "behind the drive's letter"
WRONG: dict[str, tuple[Any, ...]] = {
    "boolean": ("yes", 3, [True], {"a": 1}),
    "integer": ("x", 1.5, True, [1], -(2**70)),
    "number": ("x", True, [1.0], {"a": 1}, float("nan")),
    "string": (3, True, 1.5, {"a": 1}),
    "array": (3, True, "a", {"a": 1}),
    "object": (3, True, "a", [1], {"a": "b"}),
}
SPECIAL_TEXTS = (
    "no", "null", "~", "1e4", "007", "ab: c", "# a", "- a", "'", '"', "{a}", "[", "2025-11-16", "1:30", "a b", "äß",
    "\U0001f600", "&a", "*a", "!a", "%a", "@a", "`", "|", ">", "?", "=", "<<", ".5", "0x1", "1_000", "True", "y", "off",
    "a\\b", "a#b", "a:",
)  # fmt: skip
TEXTS = st.sampled_from(SPECIAL_TEXTS) | st.text("abz_/.-:#'\"{}[],&*!|>%@ß", min_size=1, max_size=8)


def properties() -> Values:
    """The schema of each key, dotted, with what a section's name stands for put in its place."""
    found = dict(SCHEMA["properties"])
    for name, section in sections().items():
        del found[name]
        found |= {f"{name}.{key}": value for key, value in SCHEMA["$defs"][section.__name__]["properties"].items()}
    return found


PROPERTIES = properties()


def kinds(schema: Values) -> list[Values]:
    return schema.get("anyOf", [schema])


def values_of(schema: Values) -> st.SearchStrategy[Any]:
    """Values that a schema allows."""
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from([each for each in schema["enum"] if each != "piecewise_constant"])
    low, high = schema.get("minimum"), schema.get("maximum")
    kind = schema.get("type")
    if kind == "integer":
        return st.integers(low, high) | st.integers(low, min(high or 100, 100))
    if kind == "number":
        above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
        return st.floats(
            above if low is None else low, below if high is None else high, exclude_min=above is not None,
            exclude_max=below is not None, allow_nan=False, allow_infinity=False,
        )  # fmt: skip
    if kind == "array":
        most = min(schema.get("maxItems", 3), 3)
        return st.lists(values_of(schema["items"]), min_size=schema.get("minItems", 0), max_size=most)
    if kind == "object":
        return st.dictionaries(TEXTS.filter(bool), values_of(schema["additionalProperties"]), max_size=3)
    if "anyOf" in schema:
        return st.one_of(*map(values_of, schema["anyOf"]))
    return {"boolean": st.booleans(), "string": TEXTS, "null": st.none()}[str(kind)]


STRATEGIES = {key: SPECIAL[key] if key in SPECIAL else values_of(schema) for key, schema in PROPERTIES.items()}


@st.composite
def right_values(draw: st.DrawFn, most: int = 8) -> Values:
    """Some keys with values that the schema allows, beside those that every run needs."""
    keys = draw(st.lists(st.sampled_from(sorted(PROPERTIES)), max_size=most, unique=True))
    return NEEDED | {key: draw(STRATEGIES[key]) for key in keys}


def text_of(values: Values) -> str:
    tree: Values = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    text: str = yaml.dump(tree, Dumper=ConfigDumper, allow_unicode=True)
    return text


def read(path: Path, values: Values) -> TrainConfig:
    path.write_text(text_of(values), encoding="utf-8")
    return load_config(path, folders_must_exist=False)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "run.yaml"


def defaults(path: Path) -> Values:
    """Each key's value, dotted, where nothing but what every run needs is given."""
    tree = to_dict(read(path, NEEDED))
    return {key: tree[section][name] if section else tree[name] for key in leaf_keys()
            for section, _, name in [key.rpartition(".")]}  # fmt: skip


def in_tuples(value: Any) -> Any:
    """A value of YAML as the config holds it."""
    return tuple(map(in_tuples, value)) if isinstance(value, list) else value


def test_the_schema_is_drawn_from_whole() -> None:
    assert set(PROPERTIES) == set(leaf_keys())


@settings(max_examples=80)
@given(values=right_values())
def test_an_accepted_config_is_what_was_written_and_dumps_and_loads_to_itself(path: Path, values: Values) -> None:
    try:
        config = read(path, values)
    except ConfigError as error:
        reasons = [each.sentence for each in contradictions(defaults(path) | values)] + [OF_A_WINDOWS_PATH]
        assert all(any(reason in fault for reason in reasons) for fault in error.faults), error
        assume(False)
        raise
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        held = getattr(getattr(config, section) if section else config, name)
        if not (key == "quantize" and config.disable_quantization) and "path" not in str(PROPERTIES[key]):
            assert held == in_tuples(value), key
    path.write_text(resolved_yaml(config), encoding="utf-8")
    assert load_config(path, folders_must_exist=False) == config


@settings(max_examples=80)
@given(data=st.data())
def test_a_value_of_another_type_is_one_fault_that_names_the_key(path: Path, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(PROPERTIES)))
    allowed = [str(kind["type"]) for kind in kinds(PROPERTIES[key])]
    wrong = [
        value for value in WRONG[allowed[0]]
        if not ("number" in allowed and type(value) in (int, float) and value == value)
        and not ("string" in allowed and isinstance(value, str) and "enum" not in str(PROPERTIES[key]))
    ]  # fmt: skip
    value = data.draw(st.sampled_from(wrong))
    with pytest.raises(ConfigError) as caught:
        read(path, {**NEEDED, key: value})
    (fault,) = caught.value.faults
    assert key in fault and "must be" in fault, fault


@settings(max_examples=80)
@given(
    key=st.text("abcrank_0ß", min_size=1, max_size=12)
    | st.sampled_from(sorted(PROPERTIES)).map(lambda key: f"{key.rpartition('.')[2]}s"),
    section=st.sampled_from(["", *sections()]),
    values=right_values(most=2),
)
def test_an_unknown_key_is_one_fault_that_names_it(path: Path, key: str, section: str, values: Values) -> None:
    known = {*PROPERTIES, *sections(), *OLDER_NAMES, *FORMER_KEYS}
    unknown = f"{section}.{key}" if section else key
    assume(unknown not in known)
    try:
        read(path, values)
    except ConfigError:
        assume(False)
    with pytest.raises(ConfigError) as caught:
        read(path, {**values, unknown: 1})
    (fault,) = caught.value.faults
    assert f"{key} is not a known key" in fault
