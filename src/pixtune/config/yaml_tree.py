"""Parses YAML by the rules of version 1.2, within bounds: a small file can describe a tree that fills all memory."""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

MOST_NODES = 10_000
"""Number of values that a config may have once its aliases are written out; people need a hundred."""
MOST_LEVELS = 20
"""Number of levels that values may be nested in; a config has three, and each costs the parser some of its stack."""

MERGE = "tag:yaml.org,2002:merge"
"""Tag of the key `<<`, whose value's pairs a mapping takes over. YAML 1.2 left it out, and people go on writing it."""
CORE = {name: f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}
_PLAIN_WORDS = (  # kind, what it looks like, its possible first characters
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
)
_PAIR = re.compile(r"[\ud800-\udbff][\udc00-\udfff]")
"""A character beyond 16 bits as UTF-16 has it."""
ABOUT_BACKSLASHES = (
    "In double quotes a backslash begins an escape: write a Windows path with forward slashes (C:/Users/me) or in "
    "single quotes"
)


class BoundsError(Exception):
    """A text that describes more than a config can need."""

    def __init__(self, sentence: str, line: int) -> None:
        self.sentence, self.line = sentence, line
        super().__init__(sentence, line)


class ConfigLoader(yaml.SafeLoader):
    """Reads YAML with the core types of YAML 1.2, as editors understand it, and nothing else.

    PyYAML's own loader reads `3e-4` as text, `no` as false, `1:30` as 90 and `2025-11-16` as a date.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML's own name; `add_implicit_resolver` below fills it)
    yaml_constructors = {  # noqa: RUF012
        tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (*CORE.values(), None)
    }

    level = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Composes a node as PyYAML does, one level deeper than its parent.

        Raises:
            BoundsError: it is nested too deeply.
        """
        if self.level > MOST_LEVELS:
            line = self.peek_event().start_mark.line + 1
            raise BoundsError(f"is nested more than {MOST_LEVELS} levels deep, which no config needs", line)
        self.level += 1
        try:
            node: yaml.Node | None = super().compose_node(parent, index)
        finally:
            self.level -= 1
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        """Returns a node's text, in which two escapes that JSON writes for one character are that character.

        JSON in ASCII has "\\ud83d\\ude00" for a character beyond 16 bits, and PyYAML takes each escape alone.
        """
        text: str = super().construct_scalar(node)
        return _PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)


class ConfigDumper(yaml.SafeDumper):
    """Writes YAML that ConfigLoader reads back as the same values."""

    yaml_implicit_resolvers = {}  # noqa: RUF012


for _kind, _pattern, _first in _PLAIN_WORDS:
    for _yaml_class in (ConfigLoader, ConfigDumper):
        _yaml_class.add_implicit_resolver(CORE[_kind], re.compile(rf"^(?:{_pattern})$"), list(_first))
ConfigLoader.add_implicit_resolver(MERGE, re.compile(r"^<<$"), ["<"])
ConfigDumper.add_implicit_resolver(MERGE, re.compile(r"^<<$"), ["<"])


def compose(text: str) -> yaml.Node | None:
    """Parses a text to YAML's nodes, of which an alias is the very node that it names; None for an empty text.

    Raises:
        BoundsError: it describes more than `MOST_NODES` values, itself, or more than `MOST_LEVELS` levels.
        yaml.YAMLError: it is not YAML.
    """
    root: yaml.Node | None = yaml.compose(text, ConfigLoader)
    if root is not None:
        _count(root, {}, set())
    return root


def compose_word(text: str) -> yaml.Node | None:
    """Parses the value of one word of a command line; None for an empty one.

    Text needs no quotes there, since it ends where the word does: in `img_dir=my cats #2` the `#` begins no comment, as
    it would in a file, and `&`, `*` and `!` at the beginning mean nothing. Lists, mappings and quoted text are YAML.

    Raises:
        BoundsError: as `compose`.
        yaml.YAMLError: a list, mapping or quoted text is not YAML, or what follows a `#` in it would be left out; or
            there are characters that no text has.
    """
    begins_as_yaml = text.lstrip()[:1] in tuple("[{'\"") or "\n" in text
    try:
        node = compose(text)
    except yaml.YAMLError as error:
        if begins_as_yaml or isinstance(error, yaml.reader.ReaderError):
            raise
        node = None
    if not text.strip():
        return node
    if begins_as_yaml or isinstance(node, yaml.CollectionNode):
        _refuse_comments(text)
        return node
    tag = ConfigLoader("").resolve(yaml.ScalarNode, text.strip(), (True, False))
    return yaml.ScalarNode(tag, text if tag == CORE["str"] else text.strip(), yaml.Mark("", 0, 0, 0, "", 0))


def pairs_of(mapping: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """Yields the pairs of a mapping in their order: its own, and of each `<<: *name` those whose keys it lacks."""
    taken = {key.value for key, _ in mapping.value if isinstance(key, yaml.ScalarNode)}
    for key, value in mapping.value:
        others = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if key.tag != MERGE or not all(isinstance(other, yaml.MappingNode) for other in others):
            yield key, value
            continue
        for pair in (pair for other in others for pair in pairs_of(other)):
            if pair[0].value not in taken:
                taken.add(pair[0].value)
                yield pair


def _refuse_comments(text: str) -> None:
    """Checks that all of a text is said by its tokens.

    Raises:
        yaml.YAMLError: a `#` makes the rest of a line a comment.
    """
    end = 0
    for token in yaml.scan(text, ConfigLoader):
        if "#" in text[end : token.start_mark.index]:
            raise yaml.MarkedYAMLError(problem="what follows # would be left out, as a comment")
        end = max(end, token.end_mark.index)


def _count(node: yaml.Node, counted: dict[int, int], within: set[int]) -> int:
    """Counts a node and all below it, each as often as it is named.

    Args:
        counted: numbers of nodes that were counted before.
        within: nodes that hold this one.

    Raises:
        BoundsError: see `compose`.
    """
    line = node.start_mark.line + 1
    if id(node) in within:
        raise BoundsError("holds itself, by an alias (*name) inside the value that it names (&name)", line)
    if id(node) in counted:
        return counted[id(node)]
    within.add(id(node))
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    pairs = isinstance(node, yaml.MappingNode)
    number = 1 + sum(_count(each, counted, within) for child in children for each in (child if pairs else (child,)))
    within.remove(id(node))
    if number > MOST_NODES:
        raise BoundsError(f"holds more than {MOST_NODES:,} values once aliases (*name) are written out", line)
    counted[id(node)] = number
    return number
