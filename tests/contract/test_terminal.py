"""Manners at the terminal: examples that can be typed, exit codes, suggestions, completion, `--debug`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pixtune.cli import app
from pixtune.commands.failures import exit_on_user_errors, take_debug
from pixtune.commands.words import complete_run, complete_words, forgotten_command
from pixtune.errors import ConfigError, WriteError
from tests.runs import ROOT, pixtune


def commands(command: Any = None, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the words behind `pixtune` that call it, those of groups included."""
    command = command or typer.main.get_command(app)
    yield words, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*words, name))


ALL = dict(commands())


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_help_has_an_example_that_can_be_typed(words: tuple[str, ...]) -> None:
    outcome = CliRunner().invoke(app, [*words, "--help"], terminal_width=80)
    assert outcome.exit_code == 0
    found = re.findall(r"^ +(?:Example: )?(pixtune .+)$", outcome.stdout, re.MULTILINE)
    examples = [example for example in found if shlex.split(example)[1 : len(words) + 1] == [*words]]
    assert examples, outcome.stdout
    for part in (part for example in examples for part in example.split(" && ")):
        typed, command = shlex.split(part)[1:], ALL[()]
        while "commands" in vars(command):
            command = command.commands[typed.pop(0)]
        context = command.make_context(command.name, typed)
        assert not [word for word in context.params.get("words") or () if word.startswith("-")], "an unknown option"


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["keys", "network_dim"], 0, "rank"),
        (["keys", "zzzz"], 1, "zzzz"),
        (["runs", "nowhere"], 1, "error: nowhere cannot be searched"),
        (["plan", "nowhere.yaml"], 1, "error: nowhere.yaml"),
        (["watch", "nowhere"], 1, "error: there is no folder nowhere"),
        (["validate", "nowhere"], 1, "nowhere"),
        (["trian", "x.yaml"], 2, "Did you mean 'train'?"),
        (["queue", "lst"], 2, "Did you mean 'list'?"),
        (["runs", "--jsn"], 2, "--json"),
        (["train_configs/demo.yaml", "rank=8"], 2, "pixtune train train_configs/demo.yaml rank=8"),
        (["ask", "dance", "runs/x"], 2, "sample"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_exit_codes_are_those_of_the_page_and_errors_have_no_traceback(words: list[str], code: int, told: str) -> None:
    outcome = pixtune(*words)
    assert outcome.returncode == code and told in outcome.stdout and "Traceback" not in outcome.stdout, outcome.stdout


@pytest.mark.parametrize("place", [0, 1, 2])
def test_debug_shows_where_an_error_happened_wherever_it_stands(place: int) -> None:
    words = ["runs", "nowhere"]
    words.insert(place, "--debug")
    outcome = pixtune(*words)
    assert outcome.returncode == 1 and "Traceback" in outcome.stdout and "find_runs" in outcome.stdout
    assert outcome.stdout.rstrip().splitlines()[-1].startswith("error: nowhere"), "the error itself comes last"


def test_debug_behind_two_dashes_is_a_word_like_others() -> None:
    words = ["pixtune", "sample", "--", "--debug"]
    assert not take_debug(words) and words == ["pixtune", "sample", "--", "--debug"]
    words = ["pixtune", "sample", "--debug", "a", "--debug", "--", "--debug"]
    assert take_debug(words) and words == ["pixtune", "sample", "a", "--", "--debug"]


def test_names_in_a_traceback_steer_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ConfigError("it", ["a\x1b[31mb"]) from ValueError("c\x1b]0;title\x07d")

    monkeypatch.setattr("sys.argv", ["pixtune", "--debug"])
    with pytest.raises(SystemExit):
        exit_on_user_errors(fail)
    shown = capsys.readouterr()
    assert "\x1b" not in shown.err + shown.out and "\x07" not in shown.err + shown.out


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (WriteError("full"), 1), (OSError(28, "full"), 1), (typer.BadParameter("x"), 2)],
    ids=lambda value: type(value).__name__,
)
def test_each_kind_of_error_has_its_code(error: BaseException, code: int) -> None:
    own = typer.Typer(pretty_exceptions_enable=False)

    @own.command()
    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        exit_on_user_errors(lambda: own([]))
    assert end.value.code == code


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_on_user_errors(lambda: 1 // 0)


def test_the_shell_completes_commands_files_keys_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def completed(words: str) -> list[str]:
        count = len(words.split(" ")) - 1
        env = {"_PIXTUNE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(count)}
        return CliRunner().invoke(app, prog_name="pixtune", env=env).stdout.split()

    monkeypatch.chdir(tmp_path)
    for name in ("runs/mine", "runs/other", "train_configs", ".hidden"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("train_configs/demo.yaml", "train_configs/notes.txt"):
        (tmp_path / name).touch()
    assert {"queue", "runs", "train"} <= {*completed("pixtune ")}
    assert completed("pixtune queue mo") == ["move"]
    assert completed("pixtune train train_configs/d") == ["train_configs/demo.yaml"]
    assert "data_config.img_dir=" in completed("pixtune plan data_config.i") and "rank=" in complete_words("ra")
    assert completed("pixtune watch m") == ["mine"]
    assert complete_run("runs/") == ["runs/mine/", "runs/other/"] and complete_run("/nowhere/x") == []
    assert complete_words("") == ["runs/", "train_configs/", *(word for word in complete_words("") if "=" in word)]
    assert complete_words("rank=") == [] and complete_words(".h") == [".hidden/"]
    assert completed("pixtune runs --js") == ["--json"]


@pytest.mark.parametrize("words", [[], ["train", "x.yaml"], ["--x.yaml"], ["x.txt"]])
def test_other_words_are_no_forgotten_command(words: list[str]) -> None:
    assert forgotten_command(words) is None


def test_the_page_of_exit_codes_names_every_command_with_a_verdict() -> None:
    page = (ROOT / "docs" / "exit_codes.md").read_text(encoding="utf-8")
    named = {word for row in re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE) for word in [row.split(" ")[0]]}
    assert named <= {words[0] for words in ALL if words} and {"validate", "doctor", "watch", "queue"} <= named
