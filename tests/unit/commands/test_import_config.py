"""`pixtune import`: what it writes and where, and what it leaves alone."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pixtune.commands.import_config import import_config
from pixtune.data.sample_prompts import AskedPrompt, read_prompts
from pixtune.errors import MigrationError
from tests.runs import ROOT, environment

FIXTURES = ROOT / "tests" / "fixtures" / "other_trainers"
COMMAND = (
    "accelerate launch train_dreambooth_lora_flux.py --pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev "
    "--instance_data_dir=dogs --instance_prompt='my dog' --rank=8 --max_train_steps=500"
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config of ai-toolkit in a folder of its own."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    return Path(shutil.copy(FIXTURES / "ai_toolkit" / "flux_24gb.yaml", folder / "my_run.yaml"))


def typed(*words: object) -> subprocess.CompletedProcess[str]:
    """Runs `pixtune import` in a process of its own, in this folder. It imports no torch, and takes a second."""
    command = [sys.executable, "-m", "pixtune.cli", "import", *map(str, words)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)


def test_the_command_as_it_is_typed(config, tmp_path):
    outcome = typed(config)
    assert outcome.returncode == 0, outcome.stderr
    assert "Has no counterpart here, and changes the result:" in outcome.stdout
    assert "keys from ai-toolkit. Next: pixtune plan my_run.pixtune.yaml" in outcome.stdout
    assert yaml.safe_load((tmp_path / "my_run.pixtune.yaml").read_text())["rank"] == 24


def test_an_error_is_one_block_with_an_exit_code_and_no_file(tmp_path):
    (tmp_path / "sdxl.json").write_text('{"model_family": "sdxl", "data_backend_config": "x.json"}')
    outcome = typed("sdxl.json")
    assert outcome.returncode == 1
    assert "SDXL" in outcome.stdout + outcome.stderr
    assert "Traceback" not in outcome.stdout + outcome.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["sdxl.json"]


def test_it_writes_into_this_folder_and_not_beside_the_config(config, tmp_path):
    import_config(str(config))
    assert (tmp_path / "my_run.pixtune.yaml").is_file()
    assert [path.name for path in config.parent.iterdir()] == ["my_run.yaml"]


def test_a_file_that_is_there_stays(config, tmp_path):
    target = tmp_path / "mine.yaml"
    target.write_text("mine")
    with pytest.raises(MigrationError, match="is there already"):
        import_config(str(config), "mine.yaml")
    assert target.read_text() == "mine"
    import_config(str(config), "mine.yaml", force=True)
    assert yaml.safe_load(target.read_text())["rank"] == 24


def test_the_config_itself_is_never_overwritten_without_a_word(config):
    for force in (False, True):
        with pytest.raises(MigrationError, match="the config itself"):
            import_config(str(config), str(config), force=force)
    assert "sd_trainer" in config.read_text()


def test_a_folder_as_output(config, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(MigrationError, match="is a folder: give a file"):
        import_config(str(config), "out")


def test_standard_output_has_the_config_alone(config, capsys, tmp_path):
    import_config(str(config), "-")
    assert yaml.safe_load(capsys.readouterr().out)["rank"] == 24
    assert not list(tmp_path.glob("*.yaml"))


def test_standard_input(config, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(config.read_text()))
    import_config("-", "-")
    assert yaml.safe_load(capsys.readouterr().out)["rank"] == 24


def test_standard_input_without_end(monkeypatch):
    class Endless(io.StringIO):
        def read(self, size: int | None = -1) -> str:
            assert size is not None
            assert size > 0
            return "x" * size

    monkeypatch.setattr(sys, "stdin", Endless())
    with pytest.raises(MigrationError, match="longer than any config"):
        import_config("-", "-")


def test_a_command_between_quotes(capsys):
    import_config(COMMAND, "-")
    written = yaml.safe_load(capsys.readouterr().out)
    assert (written["rank"], written["data_config"]["caption_text"]) == (8, "my dog")


def test_nothing_of_a_script_runs(tmp_path, capsys):
    script = tmp_path / "train.sh"
    script.write_text(f'touch a\nX=$(touch b)\nY=`touch c`\n{COMMAND} --output_dir="$(touch d)" --seed `touch e`\n')
    try:
        import_config(str(script), "-")
    except MigrationError as refused:
        assert "\n" not in str(refused)
    assert [path.name for path in tmp_path.iterdir()] == ["train.sh"]


def test_no_variable_of_this_machine_gets_into_a_config(capsys, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "hf_private")
    import_config(f"{COMMAND} --output_dir=$MY_SECRET", "-")
    written = capsys.readouterr().out
    assert "hf_private" not in written
    assert "the script sets no such variable" in written


def test_the_file_of_the_data_set_and_the_model_can_be_given(tmp_path, capsys):
    data = tmp_path / "mine.toml"
    data.write_text("[[datasets]]\nimage_directory = 'photos'\ncontrol_directory = 'before'\nresolution = 768\n")
    script = FIXTURES / "musubi_tuner" / "kontext.sh"
    import_config(str(script), "-", dataset=data, model="models/kontext")
    written = yaml.safe_load(capsys.readouterr().out)
    assert written["data_config"]["img_dir"] == "photos"
    assert written["data_config"]["img_size"] == 768
    assert written["pretrained_model_name_or_path"] == "models/kontext"


@pytest.mark.parametrize("content", ["", "x: [", "a: 1\n", "\0"])
def test_a_wrong_file_of_the_data_set(tmp_path, content):
    data = tmp_path / "mine.toml"
    data.write_text(content)
    with pytest.raises(MigrationError) as refused:
        import_config(str(FIXTURES / "musubi_tuner" / "kontext.sh"), "-", dataset=data)
    assert "mine.toml" in str(refused.value)


def test_a_config_made_twice_is_the_same(config, tmp_path):
    import_config(str(config), "one.yaml")
    import_config(str(config), "two.yaml")
    assert (tmp_path / "one.yaml").read_bytes() == (tmp_path / "two.yaml").read_bytes()


PROMPTS = """# seeds and sizes of their own
a cat, "sleeping" --w 768 --h 512 --d 7 --s 20 --n blurry
ein Hund über dem Fluss --d 8 --s 20
🟫 with a sign --w 512 --h 512 --s 30 --g 3
"""


def test_prompts_with_settings_of_their_own_become_a_file_of_prompts(tmp_path):
    (tmp_path / "run.toml").write_text(
        'pretrained_model_name_or_path = "flux1-dev.safetensors"\nnetwork_module = "networks.lora_flux"\n'
        'ae = "a"\nclip_l = "c"\nsample_prompts = "prompts.txt"\ntrain_data_dir = "x"\nsample_every_n_steps = 5\n'
    )
    (tmp_path / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    import_config("run.toml", "mine.yaml")
    samples = yaml.safe_load((tmp_path / "mine.yaml").read_text(encoding="utf-8"))["samples"]
    assert samples == {"prompts_file": "mine.prompts.jsonl", "every": 5, "num_steps": 20, "guidance_scale": 3.0}
    assert read_prompts(tmp_path / samples["prompts_file"]) == [
        AskedPrompt('a cat, "sleeping"', "blurry", (), (768, 512), (7,)),
        AskedPrompt("ein Hund über dem Fluss", None, (), None, (8,)),
        AskedPrompt("🟫 with a sign", None, (), (512, 512)),
    ]
    assert "prompts differ in --s" in (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    with pytest.raises(MigrationError, match=r"mine\.yaml is there already"):
        import_config("run.toml", "mine.yaml")
    (tmp_path / "mine.yaml").unlink()
    with pytest.raises(MigrationError, match=r"mine\.prompts\.jsonl is there already"):
        import_config("run.toml", "mine.yaml")


def test_prompts_with_the_same_settings_stand_in_the_config(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a cat --d 7\na dog --d 7\n")
    (tmp_path / "run.toml").write_text(
        'pretrained_model_name_or_path = "flux1-dev.safetensors"\nnetwork_module = "networks.lora_flux"\n'
        'ae = "a"\nclip_l = "c"\nsample_prompts = "prompts.txt"\n'
    )
    import_config("run.toml", "mine.yaml")
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text())["samples"] == {
        "prompts": ["a cat", "a dog"],
        "seeds": [7],
    }
    assert not (tmp_path / "mine.prompts.jsonl").exists()
