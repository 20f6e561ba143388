"""Changes single keys in a config's text and leaves all else, comments and order, as its writer has it."""

from __future__ import annotations

from typing import Any

import yaml

from pixtune.config.yaml_tree import BoundsError, ConfigDumper, compose
from pixtune.ui.answers import BadRequestError


def value_text(value: Any) -> str:
    """Returns a value as YAML in one line."""
    text: str = yaml.dump(
        value, Dumper=ConfigDumper, default_flow_style=True, allow_unicode=True, width=1 << 20, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")


def parse_value(text: str) -> Any:
    """Reads what a person typed into a field: a value in YAML; what is no YAML is text.

    Raises:
        BadRequestError: it holds more than a config can need.
    """
    from pixtune.config.yaml_tree import ConfigLoader

    try:
        compose(text)
        return yaml.load(text, ConfigLoader)
    except BoundsError as error:
        raise BadRequestError(f"the value {error.sentence}") from error
    except yaml.YAMLError:
        return text


def set_key(text: str, key: str, value: Any) -> str:
    """Returns a config's text with one key set; None removes it.

    Args:
        key: dotted, for example "data_config.img_size".

    Raises:
        BadRequestError: the text is no config whose keys can be found.
    """
    try:
        root = compose(text)
    except (yaml.YAMLError, BoundsError) as error:
        raise BadRequestError("the YAML cannot be read: correct it first") from error
    if root is None:
        root = yaml.MappingNode("tag:yaml.org,2002:map", [])
    section, _, name = key.rpartition(".")
    node: yaml.Node = root
    if section:
        found = _find(root, section)
        if found is None:
            return text if value is None else _append(text, "", f"{section}:\n  {name}: {value_text(value)}")
        node = found[1]
        if isinstance(node, yaml.ScalarNode) and node.value in ("", "null", "~"):
            text = _cut(text, *found)
            return text if value is None else _append(text, "", f"{section}:\n  {name}: {value_text(value)}")
    if not isinstance(node, yaml.MappingNode):
        raise BadRequestError(f"{section or 'the config'} holds no keys in the YAML: correct it first")
    existing = _find(node, name)
    if value is None:
        return text if existing is None else _cut(text, *existing, inside=node)
    if existing is not None:
        return _replace(text, existing[1], value)
    if node.flow_style and node.start_mark is not None:
        place = node.end_mark.index - 1
        comma = ", " if node.value else ""
        return f"{text[:place].rstrip()}{comma}{name}: {value_text(value)}{text[place:]}"
    if not section or not node.value:
        return _append(text, "", f"{name}: {value_text(value)}")
    _, last = node.value[-1]
    indent = " " * node.value[0][0].start_mark.column
    end = _line_end(text, _end_of(text, last))
    return f"{text[:end]}\n{indent}{name}: {value_text(value)}{text[end:]}"


def _find(node: yaml.Node, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == name:
                return key, value
    return None


def _end_of(text: str, node: yaml.Node) -> int:
    """Returns where a node's own text ends: the end of a block reaches to the next key, comments included."""
    if isinstance(node, yaml.ScalarNode) and node.style not in ("|", ">"):
        return int(node.end_mark.index)
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end_of(text, last[1] if isinstance(last, tuple) else last)
    end = int(node.end_mark.index)
    return end if isinstance(node, yaml.CollectionNode) and node.flow_style else len(text[:end].rstrip())


def _line_end(text: str, place: int) -> int:
    end = text.find("\n", place)
    return len(text) if end < 0 else end


def _replace(text: str, node: yaml.Node, value: Any) -> str:
    start, end = node.start_mark.index, _end_of(text, node)
    block = isinstance(node, yaml.CollectionNode) and not node.flow_style
    if block or (isinstance(node, yaml.ScalarNode) and node.value == "" and start == end):
        start = text.rindex(":", 0, start) + 1 if ":" in text[:start] else start
        return f"{text[:start]} {value_text(value)}{text[end:]}"
    return f"{text[:start]}{value_text(value)}{text[end:]}"


def _cut(text: str, key: yaml.Node, value: yaml.Node, inside: yaml.MappingNode | None = None) -> str:
    if inside is not None and inside.flow_style:
        start, end = key.start_mark.index, value.end_mark.index
        rest = text[end:].lstrip()
        if rest.startswith(","):
            end = len(text) - len(rest) + 1
            return text[:start] + text[end:].lstrip()
        before = text[:start].rstrip()
        return before.removesuffix(",") + text[end:]
    if inside is not None and len(inside.value) == 1 and inside.start_mark.column > 0:
        # The section would be left empty: it goes as a whole.
        section_start = text.rfind("\n", 0, text.rfind(":", 0, key.start_mark.index)) + 1
        return text[:section_start] + text[_line_end(text, _end_of(text, value)) + 1 :]
    start = text.rfind("\n", 0, key.start_mark.index) + 1
    return text[:start] + text[_line_end(text, max(_end_of(text, value), key.end_mark.index)) + 1 :]


def _append(text: str, indent: str, lines: str) -> str:
    return f"{text.rstrip()}\n{indent}{lines}\n" if text.strip() else f"{lines}\n"
