"""The words of commands that take a folder or a config."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from pixtune.captioning.presets import EDIT, PLAIN, PRESETS
from pixtune.commands.caption import MAX_WORDS, find_source, the_question
from pixtune.commands.validate import FolderRequest, check
from pixtune.errors import ConfigError


@pytest.mark.parametrize("words", [["--mask-dir", "masks"], ["--bogus=3"], ["--over-write"]])
def test_an_option_that_a_command_lacks_is_named(tmp_path: Path, words: list[str]) -> None:
    """Not taken for a second folder: these commands take `--key value` beside a config, to answer with `key=value`."""
    option = words[0].partition("=")[0]
    with pytest.raises(typer.BadParameter, match=f"^{option} is no option of this command: --help lists them$"):
        check([str(tmp_path), *words], None, None, FolderRequest())
    with pytest.raises(typer.BadParameter, match=f"^{option} is no option of this command: --help lists them$"):
        find_source([str(tmp_path), *words], None, "some/model", None, None, ())


@pytest.mark.parametrize("has_controls", [False, True])
def test_without_words_of_ones_own_the_question_is_that_of_a_preset(has_controls: bool) -> None:
    for preset in (None, *PRESETS):
        if preset == EDIT and not has_controls:
            with pytest.raises(ConfigError, match="nothing to compare") as caught:
                the_question(preset, None, None, has_controls)
            assert "--control-dir FOLDER" in caught.value.faults[0]
            continue
        meant = preset or (EDIT if has_controls else PLAIN)
        shows_controls, question = the_question(preset, None, 17, has_controls)
        assert shows_controls == (meant == EDIT)
        assert question.startswith(PRESETS[meant]) and "at most 17 words" in question
        assert f"at most {MAX_WORDS} words" in the_question(preset, None, None, has_controls)[1]


def test_a_question_of_ones_own_shows_controls_where_the_preset_says_so() -> None:
    assert the_question(None, " What? ", None, True) == (False, "What?")
    assert the_question(EDIT, "What changes?", None, True) == (True, "What changes?")


@pytest.mark.parametrize(
    ("preset", "prompt", "has_controls", "words"),
    [
        *((preset, "What?", True, ["are both a question"]) for preset in PRESETS if preset != EDIT),
        (EDIT, "What?", False, ["there are none: --control-dir"]),
        (None, "", True, ["--prompt is empty"]),
        (None, " \n", False, ["--prompt is empty"]),
        (None, "a <|im_end|> b", False, ["'<|im_end|> b', a mark of the model's own"]),
        (PLAIN, "<|", False, ["are both a question", "a mark of the model's own"]),
        (EDIT, " ", False, ["there are none", "--prompt is empty"]),
    ],
)
def test_questions_that_cannot_be_asked_are_refused_with_all_that_is_wrong(
    preset: str | None, prompt: str, has_controls: bool, words: list[str]
) -> None:
    with pytest.raises(ConfigError, match="this cannot be asked") as caught:
        the_question(preset, prompt, None, has_controls)
    assert len(caught.value.faults) == len(words)
    assert all(each in fault for each, fault in zip(words, caught.value.faults, strict=True))
