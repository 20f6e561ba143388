"""Faults of captions that can be read: words that steal the trigger's role, placeholders, other languages."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from pixtune.data.findings import Case, Finding, Level, count
from pixtune.inputs.printing import one_line

COMMON_SHARE = 0.8
"""Share of the captions above which a phrase stands for what all pictures have in common."""
FEWEST_CAPTIONS = 8
"""Number of captions below which it is no wonder that many agree."""

_LONGEST_PHRASE = 8
_LETTERS_READ = 4000
"""Number of characters of a caption that are looked at: more than models read."""

_LANGUAGES = {
    "English": "the and with of is are in on at to his her its their from under over wearing standing behind next",
    "German": "der die das und mit von ist sind auf einer einem einen eine ein im unter trägt steht neben vor nicht",
    "French": "le la les et avec des du une un est sont dans sur porte à côté devant qui sous au aux",
    "Spanish": "el la los las y con del una un es está están en sobre lleva junto que bajo al por",
    "Italian": "il lo la gli e con della del una un è sono nel nella sul sulla indossa accanto che sotto di",
    "Portuguese": "o a os as e com da do uma um é são no na em sobre veste ao lado que sob",
    "Dutch": "de het een en met van is zijn op in onder draagt staat naast voor niet bij aan die dat",
}
"""Words that stand in almost every sentence of a language."""
_FUNCTION_WORDS = {language: frozenset(words.split()) for language, words in _LANGUAGES.items()}
_EMPTY_WORDS = frozenset().union(*_FUNCTION_WORDS.values()) | {"a", "an"}
_FEWEST_HITS = 3
"""Number of such words that show a caption's language."""

_PLACEHOLDERS = (
    r"(todo|tbd|fixme|xxx+|n/?a|none|null|nan|untitled|caption|captions?( goes)? here|text|test|lorem ipsum.*)",
    r"((a|an|the|this) )?(photo|photograph|picture|image|img|pic|drawing)( of( (a|an|the|it|this|something))?)?",
    r"[\W\d_]*",
    r"(img|dsc|dscn|dscf|pxl|mvimg|screenshot|image|photo|picture|file|frame)[ _-]*\d[\w .-]*",
    r"[^\s]+\.(jpe?g|png|webp|bmp|tiff?|gif|heic)",
    r"(i'?m sorry|i am sorry|sorry,|as an ai|i can(no|')t (help|assist|describe|identify)).*",
)
"""Captions, in lower case without a full stop, that say nothing of their picture, refusals of captioners among them."""


@dataclass(frozen=True)
class Caption:
    """A caption with what is needed to report on it."""

    place: str
    """Short name for a person."""
    stem: str
    """Picture's file name without its extension."""
    text: str
    file: str = ""
    """Path of the file that it stands in."""


def lint_captions(captions: Sequence[Caption], triggers: Sequence[str] | None, may_be_equal: bool) -> list[Finding]:
    """Reports on captions that say nothing, or too much in common.

    Args:
        triggers: words that are to call up what is learned; None: it is not known whether there are some.
        may_be_equal: one caption for all is meant so, such as an instruction for edits.
    """
    written = [caption for caption in captions if caption.text]
    findings = [
        *_missing_triggers(written, triggers or ()),
        *_placeholders(written),
        *_common(written, triggers, may_be_equal),
        *_scripts(written),
        *_languages(written),
    ]
    return [finding for finding in findings if finding.cases]


def _missing_triggers(captions: Sequence[Caption], triggers: Sequence[str]) -> Iterator[Finding]:
    for word in triggers:
        lacking = [each for each in captions if word.casefold() not in each.text.casefold()]
        yield Finding(
            Level.WARNING, "trigger-missing",
            f"{len(lacking)} of {count(len(captions), 'caption lacks', 'captions lack')} the trigger word {word!r}",
            tuple(Case(each.place, (each.file,)) for each in lacking),
            "The LoRA learns it from captions alone: write it there.",
        )  # fmt: skip


def _placeholders(captions: Sequence[Caption]) -> Iterator[Finding]:
    empty = [each for each in captions if _is_placeholder(each)]
    yield Finding(
        Level.WARNING, "caption-placeholder",
        f"{count(len(empty), 'caption says', 'captions say')} nothing of the picture",
        tuple(Case(f"{each.place} ({_quoted(each.text)})", (each.file,)) for each in empty),
        "Describe what is seen, or leave the file empty to train it without words.",
    )  # fmt: skip


def _is_placeholder(caption: Caption) -> bool:
    text = " ".join(_beginning(caption.text).split()).casefold().rstrip(".!")
    stem = caption.stem.casefold()
    # A file's name is a caption where people name their files so: it needs letters and no number.
    is_name = text == stem and (not re.fullmatch(r"[^\W\d_]+([ -][^\W\d_]+)*", text))
    return is_name or any(re.fullmatch(pattern, text, re.DOTALL) for pattern in _PLACEHOLDERS)


def _common(captions: Sequence[Caption], triggers: Sequence[str] | None, may_be_equal: bool) -> Iterator[Finding]:
    """Reports a caption that most have, or phrases that do."""
    if len(captions) < FEWEST_CAPTIONS:
        return
    text, times = Counter(" ".join(each.text.split()) for each in captions).most_common(1)[0]
    if times > COMMON_SHARE * len(captions):
        yield Finding(
            Level.NOTE if may_be_equal else Level.WARNING, "captions-equal",
            f"{times} of {len(captions)} captions are the same",
            (Case(_quoted(text), (), {"share": times / len(captions)}),),
            "That is fine for an edit that is always the same, or one text that is meant for all."
            if may_be_equal
            else "What differs between the pictures is learned with the style then: describe each.",
        )  # fmt: skip
        return
    phrases = common_phrases([each.text for each in captions], triggers or ())
    # Without a list of triggers the phrase may be one.
    yield Finding(
        Level.WARNING if triggers else Level.NOTE, "caption-phrase",
        f"{count(len(phrases), 'phrase stands', 'phrases stand')} in more than {COMMON_SHARE:.0%} of the captions",
        tuple(Case(f"{_quoted(phrase)} ({share:.0%})", (), {"share": share}) for phrase, share in phrases),
        "They steal the trigger word's role: what all pictures have in common is tied to them, too. Remove them."
        if triggers
        else "What all pictures have in common is tied to them: they act as trigger words, meant so or not.",
    )  # fmt: skip


def common_phrases(texts: Sequence[str], apart: Sequence[str] = ()) -> list[tuple[str, float]]:
    """Returns the longest phrases that stand in most texts, each with its share of the texts, most common first.

    Phrases of words such as "with a" alone are left out, and parts of longer ones that are as common.

    Args:
        apart: words that belong to no phrase.
    """
    ends = re.compile("|".join(re.escape(word.casefold()) for word in apart if word) or r"(?!)")
    fewest = COMMON_SHARE * len(texts)
    divided = [[_words(piece) for piece in ends.split(_beginning(text).casefold())] for text in texts]
    with_word = Counter(word for pieces in divided for word in {word for words in pieces for word in words})
    seen: Counter[tuple[str, ...]] = Counter()
    for pieces in divided:  # of words that are common themselves, lest every phrase of every text be kept
        seen.update({
            words[at : at + n]
            for words in pieces
            for at in range(len(words))
            for n in range(1, min(_LONGEST_PHRASE, len(words) - at) + 1)
            if all(with_word[word] > fewest for word in words[at : at + n])
        })  # fmt: skip
    common = {phrase: times for phrase, times in seen.items() if times > fewest and not set(phrase) <= _EMPTY_WORDS}
    longest: list[tuple[str, ...]] = []
    for phrase in sorted(common, key=lambda phrase: (-len(phrase), -common[phrase], phrase)):
        # A part counts only where it is clearly more common than the whole.
        if not any(_is_part(phrase, whole) and common[phrase] <= 1.1 * common[whole] for whole in longest):
            longest.append(phrase)
    by_share = sorted(longest, key=lambda phrase: (-common[phrase], phrase))
    return [(" ".join(phrase), common[phrase] / len(texts)) for phrase in by_share]


def _is_part(phrase: tuple[str, ...], whole: tuple[str, ...]) -> bool:
    return any(whole[at : at + len(phrase)] == phrase for at in range(len(whole) - len(phrase) + 1))


def _beginning(text: str) -> str:
    """Returns the part of a caption that is looked at; a file of a megabyte is no caption."""
    return text[:_LETTERS_READ]


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.casefold()))


def _scripts(captions: Sequence[Caption]) -> Iterator[Finding]:
    """Reports captions in another script than most, and words that mix two, as look-alike letters do."""
    main: dict[str, list[Caption]] = defaultdict(list)
    mixed: list[tuple[Caption, str]] = []
    for caption in captions:
        letters = Counter(_script(mark) for mark in _beginning(caption.text) if mark.isalpha())
        if letters:
            main[letters.most_common(1)[0][0]].append(caption)
        if len(letters) > 1:
            words = [word for word in _words(_beginning(caption.text)) if _mixes_look_alikes(word)]
            mixed += [(caption, words[0])] if words else []
    yield Finding(
        Level.WARNING, "caption-mixed-letters",
        f"{count(len(mixed), 'caption has', 'captions have')} words with letters of two alphabets, which look alike",
        tuple(Case(f"{each.place} ({_quoted(word)})", (each.file,)) for each, word in mixed),
        "Type the word anew: the model reads other letters than you see.",
    )  # fmt: skip
    yield _minority(main, "caption-script", "in another script than most", "script")


def _languages(captions: Sequence[Caption]) -> Iterator[Finding]:
    found: dict[str, list[Caption]] = defaultdict(list)
    for caption in captions:
        if language := language_of(caption.text):
            found[language].append(caption)
    yield _minority(found, "caption-language", "in another language than most", "language")


def _minority(groups: dict[str, list[Caption]], code: str, what: str, kind: str) -> Finding:
    total = sum(map(len, groups.values()))
    usual = max(groups, key=lambda name: len(groups[name])) if groups else ""
    others = [(each, name) for name, members in groups.items() if name != usual for each in members]
    return Finding(
        Level.WARNING, code,
        f"{count(len(others), 'caption is', 'captions are')} {what} ({usual}: {total - len(others)} of {total})",
        tuple(Case(f"{each.place} ({name})", (each.file,)) for each, name in others),
        f"One {kind} for all, the one that you will prompt in, is learned best.",
    )  # fmt: skip


def language_of(text: str) -> str | None:
    """Guesses a European language by its function words; None where there are too few to tell."""
    words = set(_words(_beginning(text)))
    hits = sorted(((len(words & own), language) for language, own in _FUNCTION_WORDS.items()), reverse=True)
    (most, language), (next_most, _) = hits[:2]
    return language if most >= _FEWEST_HITS and most >= next_most + 2 else None


@cache
def _script(mark: str) -> str:
    name = unicodedata.name(mark, "").split(" ")[0].capitalize()
    return {"Hiragana": "Japanese or Chinese", "Katakana": "Japanese or Chinese", "Cjk": "Japanese or Chinese"}.get(
        name, name
    )


def _mixes_look_alikes(word: str) -> bool:
    scripts = {_script(mark) for mark in word if mark.isalpha()}
    return len(scripts & {"Latin", "Cyrillic", "Greek"}) > 1


def _quoted(text: str, most: int = 40) -> str:
    tidy = one_line(" ".join(text.split()))
    return f'"{tidy[: most - 3]}..."' if len(tidy) > most else f'"{tidy}"'
