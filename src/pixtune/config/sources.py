"""Sources of config values: a YAML file or `key=value` words. Both become flat entries that know their place."""

from __future__ import annotations

import logging
import re
import shlex
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from pathlib import Path
from typing import NamedTuple

import yaml

from pixtune.config.other_names import ABSENT, OTHER_NAMES, REMEDIES
from pixtune.config.schema import FORMER_KEYS, LIST_SECTIONS, OLDER_NAMES, is_leaf, leaf_keys, section_of, sections
from pixtune.config.yaml_tree import ABOUT_BACKSLASHES, CORE, BoundsError, ConfigLoader, compose, compose_word, pairs_of
from pixtune.inputs.printing import one_line
from pixtune.inputs.reading import MEBIBYTE, read_bounded

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """A place where something was written. Sorts by line; the command line comes last."""

    line: int
    text: str


class Fault(NamedTuple):
    """One problem of a config, with the place to look at."""

    place: Place
    sentence: str

    def __str__(self) -> str:
        return f"{self.place.text}: {self.sentence}"


@dataclass(frozen=True)
class Entry:
    """One value that somebody wrote."""

    key: str  # dotted, by its current name
    written_as: str  # dotted, by the name that was used
    value: object
    place: Place


class Source(NamedTuple):
    """Entries and faults of one source. `readable` is false where nothing more can be learned from it."""

    entries: dict[str, Entry]
    faults: list[Fault]
    readable: bool = True


COMMAND_LINE = Place(10**9, "command line")

LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
"""Line breaks as YAML counts them."""
LARGEST_FILE_BYTES = MEBIBYTE
"""Size that no config of a person reaches: the longest that is shipped has four thousand bytes."""


# ---- YAML


def read_file(path: Path) -> Source:
    """Returns the entries of a YAML file, and everything that is wrong with its form."""

    def at(node: yaml.Node) -> Place:
        line = node.start_mark.line + 1
        return Place(line, f"{path}:{line}")

    try:
        text = read_bounded(path, LARGEST_FILE_BYTES).decode("utf-8-sig")
        root = compose(text)
    except FileNotFoundError:
        return _unreadable(path, f"no such file{_similar_files(path)}")
    except OSError as error:
        return _unreadable(path, f"cannot be read: {error.strerror or error}")
    except UnicodeDecodeError as error:
        return _unreadable(path, f"is not UTF-8 text (byte {error.start}): save it as UTF-8")
    except BoundsError as error:
        return _unreadable(path, error.sentence, error.line)
    except yaml.MarkedYAMLError as error:
        return _unreadable(path, *_yaml_problem(error, text))
    except yaml.YAMLError as error:
        return _unreadable(path, f"is not YAML: {_unfit(error)}")
    if root is None or root.tag == CORE["null"]:
        return _unreadable(path, "is empty: a config needs at least the required keys")
    if not isinstance(root, yaml.MappingNode):
        return _unreadable(path, "holds no keys: a config is a list of `key: value` lines")
    return _collect(root, at)


def read_overrides(words: Sequence[str]) -> Source:
    """Returns the entries of `key=value` words, nested by dots. The last of two equal keys wins."""
    source = Source({}, [])
    waiting = deque(words)
    while waiting:
        word = waiting.popleft()
        key, equals, text = word.partition("=")
        if not equals or not key or word.startswith("-"):
            source.faults.append(Fault(COMMAND_LINE, _not_an_override(word, waiting)))
            continue
        try:
            node = compose_word(text)
        except BoundsError as error:
            source.faults.append(Fault(COMMAND_LINE, f"{key}: {error.sentence}"))
            continue
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or _unfit(error)
            advice = f". {ABOUT_BACKSLASHES}" if "\\" in text else ": quote it"
            source.faults.append(Fault(COMMAND_LINE, f"{key} is {text!r}, which is not YAML ({problem}){advice}"))
            continue
        if node is None:
            node = yaml.ScalarNode(CORE["null"], "")
        one = Source({}, [])
        _collect_value(key, node, COMMAND_LINE, lambda _: COMMAND_LINE, one)
        source.faults.extend(one.faults)
        for key in _replaced(source.entries, one.entries):
            del source.entries[key]
        _add_entries(source, one.entries.values())
    return source


def override_word(key: str, value: object) -> str:
    """Returns the word `key=value` as one types it in a shell, such that it is read back as this value's text."""
    text = str(value)
    try:
        node = compose_word(text)
    except (BoundsError, yaml.YAMLError):
        node = None
    is_plain = isinstance(node, yaml.ScalarNode) and (node.tag, node.value) == (CORE["str"], text)
    return shlex.quote(f"{key}={text}" if is_plain else f"{key}='{text.replace(chr(39), 2 * chr(39))}'")


def overridden(earlier: Mapping[str, Entry], later: Mapping[str, Entry]) -> dict[str, Entry]:
    """Returns the entries of two sources, of which the later one wins; a list that it gives anew replaces the whole."""
    replaced = _replaced(earlier, later)
    return {**{key: entry for key, entry in earlier.items() if key not in replaced}, **later}


def _replaced(earlier: Mapping[str, Entry], later: Mapping[str, Entry]) -> set[str]:
    """Returns the keys of earlier entries within lists of sections that later ones give anew."""
    lists = tuple(f"{key}[" for key in LIST_SECTIONS if key in later)
    return {key for key in earlier if key.startswith(lists)}


def _not_an_override(word: str, following: deque[str]) -> str:
    """Says how a word should have been written that is no `key=value`, and takes the words that belong to it."""
    key, equals, value = word.lstrip("-").partition("=")
    written = [word]
    if key and not equals and following and following[0] == "=":
        written.append(following.popleft())
    if key and not value and following and "=" not in following[0] and not following[0].startswith("--"):
        written.append(following.popleft())
        value = written[-1]
    if key and value:
        name = key.replace("-", "_") if word.startswith("-") else key
        meant = OTHER_NAMES.get(name, name)
        if is_known(meant):
            return f"{' '.join(written)!r} is not an override: write {meant}={value}"
        if word.startswith("-"):  # an option that is misspelt looks like some key, too
            what, hint = "neither an option of this command (--help lists them) nor a key", _hint(name, ALIKE)
        else:
            what, hint = "not a known key", _hint(name)
        return f"{' '.join(written)!r}: {name} is {what} of the config{hint}"
    return f"{word!r} is not an override (key=value)"


def _unreadable(path: Path, sentence: str, line: int = 0) -> Source:
    place = Place(line, f"{path}:{line}" if line else str(path))
    return Source({}, [Fault(place, sentence)], readable=False)


def _unfit(error: yaml.YAMLError) -> str:
    """Describes a character that no YAML may hold, on one line."""
    if not isinstance(error, yaml.reader.ReaderError):
        return str(error)
    return f"character number {error.position + 1} has the code {error.character:#x}, which no text has"


def _yaml_problem(error: yaml.MarkedYAMLError, text: str) -> tuple[str, int]:
    mark = error.problem_mark or error.context_mark
    parts = [part for part in (error.context, error.problem) if part]
    sentence = f"is not YAML: {', '.join(parts)}"
    # A quote that `"C:\\Users\\"` leaves open is noticed far below the line where it stands.
    begins = error.context_mark or mark
    if begins is not None and "\\" in LINE_BREAK.split(text)[begins.line]:
        sentence += f". {ABOUT_BACKSLASHES}"
    return sentence, mark.line + 1 if mark else 0


def _similar_files(path: Path) -> str:
    shipped = Path("train_configs") / path.name
    if shipped.is_file():
        return f"; there is {shipped}"
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    names = sorted(file.name for file in path.parent.iterdir() if file.suffix in (".yaml", ".yml"))
    near = get_close_matches(path.name, names, n=3, cutoff=0.5) or names[:5]
    return f"; that folder has {', '.join(near)}" if near else "; that folder holds no YAML file"


def _collect(root: yaml.MappingNode, at: Callable[[yaml.Node], Place]) -> Source:
    source = Source({}, [])
    _collect_mapping(root, "", at, source)
    return source


def _collect_mapping(mapping: yaml.MappingNode, prefix: str, at: Callable[[yaml.Node], Place], source: Source) -> None:
    first_seen: dict[str, Place] = {}
    for key_node, value_node in pairs_of(mapping):
        place = at(key_node)
        if not isinstance(key_node, yaml.ScalarNode) or "." in key_node.value:
            shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
            source.faults.append(Fault(place, f"{shown} cannot be a key here: nest keys by indenting them"))
            continue
        key = prefix + key_node.value
        if key_node.value in first_seen:
            first = first_seen[key_node.value].text
            source.faults.append(Fault(place, f"{key} is given twice, first at {first}: keep one"))
            continue
        first_seen[key_node.value] = place
        _collect_value(key, value_node, place, at, source)


def _collect_value(
    written_as: str, node: yaml.Node, place: Place, at: Callable[[yaml.Node], Place], source: Source
) -> None:
    key = current_name(written_as)
    section = section_of(key)
    if section is not None:
        if isinstance(node, yaml.MappingNode):
            _collect_mapping(node, f"{written_as}.", at, source)
        elif node.tag != CORE["null"]:  # a section whose keys are all commented out is an empty section
            keys = ", ".join(section.model_fields)
            source.faults.append(
                Fault(place, f"{written_as} is {show(_plain(node))}: it is a section with keys of its own: {keys}")
            )
        return
    if key in LIST_SECTIONS and node.tag == CORE["null"]:  # as where all items of a list are commented out
        node = yaml.SequenceNode(CORE["seq"], [])
    if key in LIST_SECTIONS and isinstance(node, yaml.SequenceNode):
        _add_entries(source, [Entry(key, written_as, [{} for _ in node.value], place)])
        for number, item in enumerate(node.value):
            _collect_value(f"{written_as}[{number}]", item, at(item), at, source)
        return
    if key in FORMER_KEYS:
        logger.warning("%s: %s has no effect any more: %s. Remove it.", place.text, key, FORMER_KEYS[key])
        return
    if not is_leaf(key):
        if inner := _mappings(node):  # a section of another trainer: its keys are answered one by one
            for mapping in inner:
                _collect_mapping(mapping, f"{written_as}.", at, source)
            return
        source.faults.append(Fault(place, f"{written_as} is not a known key (value {show(_plain(node))}){_hint(key)}"))
        return
    try:
        value = ConfigLoader("").construct_document(node)
    except (yaml.YAMLError, ValueError, KeyError):  # a YAML tag of another kind, or one that its text does not fit
        source.faults.append(Fault(place, f"{key} has a value of a kind that configs do not support ({node.tag})"))
        return
    _add_entries(source, [Entry(key, written_as, value, place)])


def _mappings(node: yaml.Node) -> list[yaml.MappingNode]:
    """Returns a mapping with keys, or a list's items where all of them are such; else nothing."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    found = [each for each in nodes if isinstance(each, yaml.MappingNode) and each.value]
    return found if len(found) == len(nodes) else []


def _plain(node: yaml.Node) -> object:
    """Returns a value for a message: as it was written, or the kind of thing it is."""
    try:
        return ConfigLoader("").construct_document(node)
    except (yaml.YAMLError, ValueError, KeyError):
        return node.tag


def _add_entries(source: Source, entries: Iterable[Entry]) -> None:
    """Adds entries; an older and a newer name of one key with different values are a problem."""
    for entry in entries:
        earlier = source.entries.get(entry.key)
        if earlier is not None and earlier.written_as != entry.written_as and earlier.value != entry.value:
            source.faults.append(
                Fault(
                    entry.place,
                    f"{earlier.written_as} is {show(earlier.value)} ({earlier.place.text}) and {entry.written_as} is "
                    f"{show(entry.value)}; they are two names of {entry.key}: keep one",
                )
            )
        source.entries[entry.key] = entry


# ---- names


def current_name(key: str) -> str:
    """Replaces older names in a dotted key by their current ones."""
    return ".".join(OLDER_NAMES.get(part, part) for part in key.split("."))


def is_known(key: str) -> bool:
    """Returns whether a dotted name is one of a key, today's or an older one."""
    return is_leaf(current_name(key)) or key in FORMER_KEYS


RATHER_ALIKE, ALIKE = 0.65, 0.8
"""Likeness of two names, 1 at most, from which on one may be meant by the other; the second is for words that may be
something else."""


def nearest_keys(key: str, least: float = RATHER_ALIKE) -> list[str]:
    """Returns the known keys that `key` most likely meant, best first; several only where they are equally good.

    Keys are compared by their last part, so that one in the wrong section is found too.
    """
    last = _last_part(key)
    scores: dict[str, float] = {}
    for candidate in (*leaf_keys(), *sections()):
        name = candidate.rpartition(".")[2]
        scores[candidate] = max(SequenceMatcher(None, last, text).ratio() for text in (name, candidate))
        if set(last.split("_")) < set(name.split("_")):  # max_steps: max_train_steps
            scores[candidate] = max(scores[candidate], 0.85)
    best = max(scores.values())
    return [candidate for candidate, score in scores.items() if score == best][:3] if best >= least else []


def _hint(key: str, least: float = RATHER_ALIKE) -> str:
    section, last = current_name(key).rpartition(".")[0], _last_part(key)
    if last in ABSENT:
        return f". {ABSENT[last]}"
    known_as = OTHER_NAMES.get(last, "")
    of_section = section_of(section)
    within = of_section.model_fields if of_section else ()
    near = [f"{section}.{name}" for name in get_close_matches(last, within, n=1, cutoff=0.9)]  # a letter is missing
    # samples.steps: samples.num_steps
    near = near or [f"{section}.{name}" for name in within if last in name.split("_")]
    if "[" in section and not near:  # in a list, only its own keys can be meant
        near = [f"{section}.{name}" for name in get_close_matches(last, within, n=1)]
    near = near or ([known_as] if known_as else nearest_keys(key, least))
    remedy = f" {REMEDIES[known_as]}" if known_as in REMEDIES and near == [known_as] else ""
    return f"; did you mean {' or '.join(near)}?{remedy}" if near else ""


def _last_part(key: str) -> str:
    return key.rpartition(".")[2].lower().replace("-", "_")


def show(value: object) -> str:
    """Returns a value as one would write it in YAML, on one line and shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = one_line(f'"{value}"' if isinstance(value, str) else str(value))
    return text if len(text) <= 80 else f"{text[:76]} ..."
