"""Wrong configs: all problems together, each with its place, key, value and what would be right."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pixtune.config import load_config
from pixtune.config.contradictions import contradictions
from pixtune.config.other_names import ABSENT, OTHER_NAMES, REMEDIES
from pixtune.config.schema import item_keys, leaf_keys, sections
from pixtune.config.sources import nearest_keys
from pixtune.errors import ConfigError
from pixtune.inputs.printing import one_line


def test_all_faults_come_together_in_the_order_of_the_file(faults_of):
    faults = faults_of(
        "pretrained_model_name_or_path: some/model\n"  # 1
        "img_dir: /pictures\n"  # 2
        "rank: true\n"
        "learning_rat: 3e-4\n"  # 4
        "adam_beta1: 1.5\n"
        "max_train_steps: 10\n"  # 6
        "lr_scheduler: cosin\n"
        "data_config: {img_dir: /no/such/folder, train_batch_size: 2}\n"  # 8
        "train_batch_size: 4\n"
        "validation: {held_out: 0.5, held_out_dir: /no/other/folder}\n",  # 10
        "seed=-1",
        "rank.x=1",
        "nonsense",
    )
    expected = [
        ("run.yaml", "output_dir is required and missing"),
        ("run.yaml:2", 'img_dir is not a known key (value "/pictures"); did you mean data_config.img_dir?'),
        ("run.yaml:3", "rank is true: must be a whole number"),
        ("run.yaml:4", "learning_rat is not a known key (value 0.0003); did you mean learning_rate?"),
        ("run.yaml:5", "adam_beta1 is 1.5: must be less than 1"),
        ("run.yaml:7", 'lr_scheduler is "cosin": must be "constant", "constant_with_warmup"'),
        ("run.yaml:8", 'data_config.img_dir is "/no/such/folder": there is no such folder'),
        ("run.yaml:9", "train_batch_size is 4 and data_config.train_batch_size is 2: give it once, or equal"),
        ("run.yaml:10", "validation.held_out is 0.5 and validation.held_out_dir is '/no/other/folder': choose one"),
        ("run.yaml:10", 'validation.held_out_dir is "/no/other/folder": there is no such folder'),
        ("command line", "'nonsense' is not an override (key=value)"),
        ("command line", "rank.x is not a known key (value 1)"),
        ("command line", "seed is -1: must be at least 0"),
    ]
    assert len(faults) == len(expected), faults
    for fault, (place, sentence) in zip(faults, expected, strict=True):
        assert fault.startswith(f"{place}: {sentence}"), fault


def test_the_message_is_headed_by_file_and_count(write, minimal):
    path = write(f"{minimal}rank: 0\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path} has 1 problem:\n  - {path}:5: rank is 0: must be at least 1"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("rank: true", "rank is true: must be a whole number"),
        ("rank: 1.0", "rank is 1.0: must be a whole number"),
        ('rank: "8"', 'rank is "8": must be a whole number'),
        ("rank: null", "rank is null: must be a whole number"),
        ("rank: 010", "rank is 10.0: must be a whole number"),
        ("rank: [1]", "rank is [1]: must be a whole number"),
        ("rank: {a: 1}", "rank is {'a': 1}: must be a whole number"),
        ("learning_rate: fast", 'learning_rate is "fast": must be a number'),
        ("learning_rate: true", "learning_rate is true: must be a number"),
        ("learning_rate: .inf", "learning_rate is inf: must be a finite number"),
        ("learning_rate: .nan", "learning_rate is nan: must be a finite number"),
        ("learning_rate: 1e999", "learning_rate is inf: must be a finite number"),
        ("learning_rate: 0", "learning_rate is 0: must be greater than 0"),
        ("pin_memory: yes", 'pin_memory is "yes": must be true or false'),
        ("deterministic: 1", "deterministic is 1: must be true or false"),
        ("tracker_project_name: 7", "tracker_project_name is 7: must be text (put it in quotes)"),
        (
            "report_to: tensorbord",
            'report_to is "tensorbord": must be "tensorboard" or "wandb"; did you mean "tensorboard"?',
        ),
        ("mixed_precision: BF16", 'mixed_precision is "BF16": must be "no" or "bf16"; did you mean "bf16"?'),
        ("trigger_words: sks", 'trigger_words is "sks": must be a list'),
        ("trigger_words: [sks, 3]", "trigger_words is ['sks', 3]: must be text (put it in quotes) in item 2"),
        ("samples: {sizes: [64, 64]}", "samples.sizes is [64, 64]: must be a list in item 1 or a list in item 2"),
        ("samples: {strengths: [11]}", "samples.strengths is [11]: must be at most 10 in item 1"),
        ("samples: {seeds: [0, x]}", "samples.seeds is [0, 'x']: must be a whole number in item 2"),
        ("samples: 3", "samples is 3: it is a section with keys of its own: prompts, controls, prompts_file"),
        ("samples: [prompts]", "samples is ['prompts']: it is a section with keys of its own: prompts"),
        (
            "objective: {shift: modl}",
            'objective.shift is "modl": must be "model" or "none" or a number; did you mean "model"?',
        ),
        ("objective: {logit_std: 0}", "objective.logit_std is 0: must be greater than 0"),
        (
            "lr_step_rules: 1-x",
            'lr_step_rules is "1-x": must be FACTOR:UNTIL_STEP and a last factor, with steps that rise, for example',
        ),
        ("logging_dir: ''", 'logging_dir is "": must be a path, which empty text is not'),
        ("logging_dir: 5", "logging_dir is 5: must be a path"),
        ("rank: !!timestamp 2001-01-01", "rank has a value of a kind that configs do not support"),
        (
            "trigger_words: [!!python/name:os.system x]",
            "trigger_words has a value of a kind that configs do not support",
        ),
        ("data_config.img_size: 64", "data_config.img_size cannot be a key here: nest keys by indenting them"),
        ("[a]: 3", "a list or mapping cannot be a key here"),
        ("max_train_steps: 11", "max_train_steps is given twice, first at run.yaml:3: keep one"),
        ("validation: {held_out: 0, patience: 3}", "validation.patience is given (3) and validation.held_out is 0"),
        ("validation: {held_out: 1}", "validation.held_out is 1, which leaves no picture to train on"),
        ("lr_scheduler: piecewise_constant", 'lr_scheduler is "piecewise_constant", which needs lr_step_rules'),
        ('lr_step_rules: "1:10,0.1"', 'lr_step_rules is given and lr_scheduler is "constant", which does not read it'),
        ("? {a: 1}\n: 3", "a list or mapping cannot be a key here"),
        ("8: 3", "8 is not a known key (value 3)"),
    ],
)
def test_one_wrong_line_is_one_plain_sentence(faults_of, minimal, line, sentence):
    faults = faults_of(f"{minimal}{line}\n")
    assert len(faults) == 1, faults
    assert faults[0].startswith(f"run.yaml:5: {sentence}"), faults[0]
    assert "[type=" not in faults[0] and "Input should" not in faults[0] and "http" not in faults[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("samples.prompts=[a,b] samples.controls=[[x]]", "samples.controls has 1 lists and samples.prompts 2 prompts"),
        ("samples.prompts=[a] samples.controls=[[x],[x]]", "samples.controls has 2 lists and samples.prompts 1 "),
        (
            "samples.prompts=[a] samples.controls=[[]]",
            "samples.controls is [[]]: must be a list of at least 1 in",
        ),
        ("method=full lora_alpha=1", "lora_alpha given and method is full"),
        ("method=full lora_alpha=1 lora_targets=[to_q]", "lora_targets and lora_alpha given and method is full"),
        ("method=full keep_plain=[to_q]", "keep_plain given and method is full"),
    ],
)
def test_keys_that_contradict_each_other_are_one_sentence(faults_of, minimal, words, sentence):
    (fault,) = faults_of(minimal, *words.split())
    assert sentence in fault


@pytest.mark.parametrize("key", sorted(leaf_keys()))
def test_no_key_takes_a_nested_mapping_and_none_answers_in_pydantics_words(faults_of, minimal, key):
    faults = faults_of(minimal, f"{key}={{nested: {{deeper: 1}}}}")
    assert any(fault.startswith(f"command line: {key} is {{'nested'") for fault in faults), faults
    assert not any("Input should" in fault or "[type=" in fault for fault in faults), faults


def test_required_keys_are_asked_for_by_name_and_meaning(faults_of):
    faults = faults_of("max_train_steps: 1\n")
    assert [fault.split(" is required")[0] for fault in faults] == [
        "run.yaml: data_config.img_dir",
        "run.yaml: output_dir",
        "run.yaml: pretrained_model_name_or_path",
    ]
    assert "Folder of pictures" in faults[0]


def test_a_wrong_value_causes_no_second_fault_by_its_absence(faults_of, minimal):
    text = minimal.replace("max_train_steps: 10", "max_train_steps: ten")
    assert faults_of(text) == ['run.yaml:3: max_train_steps is "ten": must be a whole number']


def test_a_wrong_value_that_is_overridden_is_no_fault(write, minimal):
    assert load_config(write(f"{minimal}rank: many\n"), ["rank=8"]).rank == 8


def test_two_names_of_one_key_with_different_values(faults_of, minimal):
    assert faults_of(f"{minimal}use_8bit_adam: true\nadam8bit: false\n") == [
        "run.yaml:6: use_8bit_adam is true (run.yaml:5) and adam8bit is false; they are two names of adam8bit: keep one"
    ]
    assert len(faults_of(minimal, "use_8bit_adam=true", "adam8bit=false")) == 1
    assert (
        len(
            faults_of(
                f"{minimal}cuda_features: {{enable_cudnn_sdp: true}}\ncuda_13_features: {{enable_cudnn_sdp: false}}"
            )
        )
        == 1
    )


def test_a_fault_under_an_older_name_is_told_in_the_name_that_was_written(faults_of, minimal):
    assert faults_of(f"{minimal}use_8bit_adam: maybe\n") == [
        'run.yaml:5: use_8bit_adam is "maybe": must be true or false'
    ]


def test_duplicates_inside_a_section(faults_of, pictures):
    text = f"pretrained_model_name_or_path: m\noutput_dir: o\nmax_train_steps: 1\ndata_config:\n  img_dir: {pictures}\n"
    assert faults_of(f"{text}  img_size: 64\n  img_size: 128\n") == [
        "run.yaml:7: data_config.img_size is given twice, first at run.yaml:6: keep one"
    ]


# ---- folders


def test_every_folder_key_is_checked(faults_of, minimal):
    faults = faults_of(
        minimal, "data_config.control_dir=/no/a", "validation.held_out_dir=/no/b", "data_config.img_dir=/no/c"
    )
    assert len(faults) == 3 and all("there is no such folder" in fault for fault in faults)


def test_a_relative_folder_says_where_it_was_looked_for(faults_of, minimal, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (fault,) = faults_of(minimal, "data_config.img_dir=./elsewhere")
    assert f"(looked for {tmp_path / 'elsewhere'})" in fault


def test_a_file_is_no_folder(faults_of, minimal, tmp_path):
    (tmp_path / "file").write_text("x")
    (fault,) = faults_of(minimal, f"data_config.img_dir={tmp_path / 'file'}")
    assert fault.endswith("is a file, not a folder")
    (fault,) = faults_of(minimal, f"output_dir={tmp_path / 'file'}")
    assert fault.endswith("is a file, not a folder")


# ---- files that cannot be read


@pytest.mark.parametrize(
    ("content", "place", "sentence"),
    [
        (b"", "run.yaml", "is empty"),
        (b"# only a comment\n", "run.yaml", "is empty"),
        (b"null\n", "run.yaml", "is empty"),
        (b"- rank\n- 3\n", "run.yaml", "holds no keys"),
        (b"just words\n", "run.yaml", "holds no keys"),
        (b"rank: 3\n  seed: 4\n", "run.yaml:2", "is not YAML: mapping values are not allowed here"),
        (b"a: 1\nb: [1,\n", "run.yaml:3", "is not YAML: while parsing a flow node"),
        (b"a: 1\n\trank: 3\n", "run.yaml:2", "is not YAML"),
        (b"a: 1\n---\nb: 2\n", "run.yaml:2", "is not YAML: expected a single document"),
        (b"a: *nowhere\n", "run.yaml:1", "is not YAML: found undefined alias"),
        (b"name: caf\xe9\n", "run.yaml", "is not UTF-8 text (byte 9)"),
        (b"a: \x00\n", "run.yaml", "is not YAML"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, content, place, sentence):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["rank=0", "no-override"])
    faults = [fault.replace(str(path), "run.yaml") for fault in caught.value.faults]
    assert faults[0].startswith(f"{place}: {sentence}"), faults
    assert faults[1:] == ["command line: 'no-override' is not an override (key=value)"]  # no talk of missing keys


def test_a_missing_file_names_the_nearest(tmp_path, write, minimal):
    write(minimal)
    with pytest.raises(ConfigError, match=r"no such file; that folder has run\.yaml"):
        load_config(tmp_path / "rum.yaml")
    with pytest.raises(ConfigError, match=r"the folder .* does not exist either"):
        load_config(tmp_path / "nowhere" / "run.yaml")
    with pytest.raises(ConfigError, match="cannot be read: it is a folder, not a file"):
        load_config(tmp_path)


def test_a_mapping_that_holds_itself_is_a_fault(faults_of):
    for text in ("a: &a {b: *a}\n", "data_config: &a {img_dir: *a}\n"):
        (fault,) = faults_of(text)
        assert fault.startswith("run.yaml:1: holds itself, by an alias")


def test_overrides_that_are_not_yaml(faults_of, minimal):
    (fault,) = faults_of(minimal, "samples.prompts=[a")
    assert fault.startswith("command line: samples.prompts is '[a', which is not YAML")
    (fault,) = faults_of(minimal, "--rank=3")
    assert fault == "command line: '--rank=3' is not an override: write rank=3"


# ---- names


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("img_dir", "data_config.img_dir"),
        ("data_config.imgdir", "data_config.img_dir"),
        ("data_config.rank", "rank"),
        ("learning-rate", "learning_rate"),
        ("Learning_Rate", "learning_rate"),
        ("lr_warmup", "lr_warmup_steps"),
        ("data", "data_config"),
        ("cuda.enable_tf32_compute", "cuda_features.enable_tf32_compute"),
        ("sample_every", "samples.every"),
        ("max_steps", "max_train_steps"),
    ],
)
def test_the_nearest_known_key(written, meant):
    assert nearest_keys(written)[0] == meant


def test_nothing_near_is_better_than_something_far():
    assert nearest_keys("zzzz") == []


def test_contradictions_are_a_pure_function_of_what_is_known():
    assert contradictions({}) == []
    assert [found.keys for found in contradictions({"max_train_steps": None, "num_train_epochs": None})] == [
        ("max_train_steps", "num_train_epochs")
    ]
    known = set(leaf_keys())
    for keys in (("train_batch_size", "data_config.train_batch_size"), ("lr_scheduler", "lr_step_rules")):
        assert set(keys) <= known


# ---- names that nobody gives a file


@pytest.mark.parametrize(
    ("written", "held"),
    [
        (r'"C:\new\train"', "a line feed and a tabulator"),
        (r'"C:\bin\f"', "a backspace and a form feed"),
        (r'"D:\Lora\Pictures"', "U+2028 and U+2029"),
        (r'"D:\NewRun"', "U+0085"),
        (r'"D:\_mine"', "slash behind the drive's letter"),
        (r'"a\e[2Jb"', "U+001B"),
        (r'"run\0"', "U+0000"),
    ],
)
@pytest.mark.parametrize("key", ["output_dir", "data_config.cache_dir", "resume_from_checkpoint"])
def test_a_windows_path_in_double_quotes_is_named_with_the_remedy(faults_of, minimal, key, written, held):
    section, _, name = key.rpartition(".")
    text = minimal.replace("output_dir: out\n", "") if key == "output_dir" else f"{minimal}"
    line = f"{name}: {written}\n"
    if section:
        text = text.replace("{img_dir", f"{{{line.strip()}, img_dir")
    else:
        text += line
    (fault,) = (fault for fault in faults_of(text) if fault.split(": ", 1)[1].startswith(f"{key} is"))
    assert held in fault and "forward slashes (C:/Users/me) or in single quotes" in fault
    assert one_line(fault) == fault


@pytest.mark.parametrize("path", [r'"C:\Umbra\out"', r'"C:\new\"', r'"D:\data\run"', r'"\xyz"', r'"C:\12"'])
def test_a_backslash_that_is_no_escape_gets_the_same_advice(faults_of, minimal, path):
    (fault,) = faults_of(f"{minimal}logging_dir: {path}\n")
    assert "is not YAML" in fault and "forward slashes (C:/Users/me) or in single quotes" in fault


@pytest.mark.parametrize("line_break", ["\r", "\r\n", "\x85", "\u2028"])
def test_lines_are_counted_as_yaml_counts_them(faults_of, minimal, line_break):
    (fault,) = faults_of(f'{minimal}logging_dir: "C:\\new'.replace("\n", line_break))
    assert "is not YAML" in fault and "forward slashes (C:/Users/me) or in single quotes" in fault


@pytest.mark.parametrize("path", [r"'C:\new\train'", r"C:\new\train", '"C:/new/train"', "été/ß 漢", "'#x y'"])
def test_paths_that_are_written_right_are_read_as_they_are(write, minimal, path):
    config = load_config(write(f"{minimal}logging_dir: {path}\n"))
    assert str(config.logging_dir) == path.strip("'\"")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("lr", "learning_rate"),
        ("network_dim", "rank"),
        ("network.linear", "rank"),
        ("lora_rank", "rank"),
        ("resolution", "data_config.img_size"),
        ("data_config.resolution", "data_config.img_size"),
        ("steps", "max_train_steps"),
        ("train.steps", "max_train_steps"),
        ("samples.steps", "samples.num_steps"),
        ("optimizer_type", "optimizer"),
        ("batch_size", "train_batch_size"),
        ("Instance-Data-Dir", "data_config.img_dir"),
        ("sample_every_n_steps", "samples.every"),
        ("save_every", "checkpointing_steps"),
        ("cache_latents", "precompute_image_embeddings"),
        ("discrete_flow_shift", "objective.shift"),
        ("blocks_to_swap", "gpu_memory_limit_gib"),
        ("network_weights", "init_lora"),
    ],
)
def test_a_key_of_another_trainer_is_answered_with_ours(faults_of, minimal, theirs, ours):
    (fault,) = faults_of(minimal, f"{theirs}=1")
    assert f"did you mean {ours}?" in fault


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (["--rank", "8"], "rank=8"),
        (["--learning-rate", "1e-3"], "learning_rate=1e-3"),
        (["--rank=8"], "rank=8"),
        (["--lr", "1e-3"], "learning_rate=1e-3"),
        (["rank", "=", "8"], "rank=8"),
        (["rank", "8"], "rank=8"),
        (["rank=", "8"], ""),
    ],
)
def test_keys_that_are_written_as_elsewhere_are_answered_with_how_to_write_them(faults_of, minimal, words, written):
    faults = faults_of(minimal, *words)
    if written:
        assert [fault.partition("is not an override: ")[2] for fault in faults] == [f"write {written}"]
    else:
        assert "command line: '8' is not an override (key=value)" in faults


@pytest.mark.parametrize(
    ("words", "named", "meant"),
    [
        (["--cards", "4090"], "cards", ""),  # "write cards=4090" would send people in a circle
        (["--cards=4090"], "cards", ""),
        (["--gpu", "2"], "gpu", ". The GPU is found by itself: leave it out"),
        (["--lerning_rate", "1e-4"], "lerning_rate", "; did you mean learning_rate?"),
        (["--samples.prompt", "x"], "samples.prompt", "; did you mean samples.prompts?"),
    ],
)
def test_what_is_no_key_is_never_said_to_be_one(faults_of, minimal, words, named, meant):
    (fault,) = faults_of(minimal, *words)
    of_what = "is neither an option of this command (--help lists them) nor a key of the config"
    assert fault.rstrip(".") == f"command line: {' '.join(words)!r}: {named} {of_what}{meant}"


def test_a_text_in_place_of_a_list_is_answered_with_the_list(faults_of, minimal):
    (fault,) = faults_of(minimal, "samples.prompts=a cat")
    assert fault.endswith('samples.prompts is "a cat": must be a list, as ["a cat"]')
    (fault,) = faults_of(minimal, "samples.prompts=prompts.txt")
    assert fault.endswith("; a file of prompts is samples.prompts_file"), "the list would draw the file's name"


def test_the_table_of_other_names_leads_to_keys_that_exist_and_shadows_none():
    known = {*leaf_keys(), *item_keys(), *sections()}
    assert {*OTHER_NAMES.values(), *REMEDIES} <= known
    assert not {name for name in (*OTHER_NAMES, *ABSENT) if name in known}
    assert not OTHER_NAMES.keys() & ABSENT.keys()


@pytest.mark.parametrize("theirs", ["noise_offset", "ema_power", "train.ema_power", "network_dropout", "vae_tiling"])
def test_a_key_that_means_nothing_here_is_answered_with_what_to_do(faults_of, minimal, theirs):
    (fault,) = faults_of(minimal, f"{theirs}=1")
    assert "leave it out" in fault and "did you mean" not in fault


def test_the_sections_of_another_trainers_file_are_answered_key_by_key(faults_of, minimal):
    theirs = "config: {process: [{network: {linear: 16, linear_alpha: 8}, train: {steps: 9, noise_offset: 0.1}}]}\n"
    hints = [fault.partition(") ")[0] + fault.partition(")")[2] for fault in faults_of(minimal + theirs)]
    for key, hint in (("linear", "rank?"), ("linear_alpha", "lora_alpha?"), ("steps", "max_train_steps?")):
        assert any(f".{key} is not a known key" in fault and f"did you mean {hint}" in fault for fault in hints), hints
    assert len(hints) == 4


def test_a_trigger_word_is_said_to_change_no_caption(faults_of, minimal):
    (fault,) = faults_of(minimal, "trigger_word=zwx")
    assert "did you mean trigger_words?" in fault and "write the word into every caption" in fault


# ---- numbers beyond all use


@pytest.mark.parametrize(
    "override",
    [
        "data_config.img_size=1000000000",
        "data_config.control_size=99999999999999999999",
        "samples.width=8",
        "samples.height=0",
        "samples.num_steps=0",
        "samples.seeds=[36893488147419103232]",
        f"seed={2**63}",
        "data_config.num_workers=1000000",
        "data_config.train_batch_size=2000000000",
        "num_train_epochs=10000000000",
        "max_train_steps=0",
        "rank=1000000000",
        "learning_rate=1e999",
        "samples.guidance_scale=.nan",
    ],
)
def test_a_number_beyond_all_use_is_refused_before_anything_is_made_of_it(faults_of, minimal, override):
    key = override.partition("=")[0]
    (fault,) = faults_of(minimal, override)
    assert fault.startswith(f"command line: {key} is ") and "must be" in fault


@pytest.mark.parametrize(
    "rules", ["e:1,0.1", "1:10,0.1:5,1", "1:10,0.5:10,1", "1:0,1", "-1:10,1", "1:10", "nan:1,1", "1:1.5,1"]
)
def test_rules_of_a_schedule_that_the_schedule_could_not_read(faults_of, minimal, rules):
    (fault,) = faults_of(minimal, "lr_scheduler=piecewise_constant", f"lr_step_rules='{rules}'")
    assert f'lr_step_rules is "{rules}": must be FACTOR:UNTIL_STEP' in fault


def test_half_a_character_is_no_text(faults_of, minimal):
    (fault,) = faults_of(f'{minimal}samples: {{prompts: ["a \\ud800 b"]}}\n')
    assert "lone surrogate" in fault


# ---- folders that cannot be written to


@pytest.mark.parametrize("key", ["output_dir", "data_config.cache_dir"])
def test_a_folder_that_cannot_be_made_is_found_out_with_all_else(faults_of, minimal, tmp_path, key):
    (tmp_path / "file").write_text("x")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    for name in ("file", "file/run", "file/a/b", "nowhere", "nowhere/run"):
        (fault,) = faults_of(minimal, f"{key}={tmp_path / name}")
        assert key in fault and ("is a file, not a folder" in fault or "is a link to nothing" in fault)


@pytest.mark.parametrize("special", ["fifo", "folder", "device", "large"])
def test_a_config_that_is_no_regular_file_of_a_configs_size_is_not_waited_for(tmp_path, special):
    path = tmp_path / "run.yaml"
    if special == "fifo":
        os.mkfifo(path)
    elif special == "folder":
        path.mkdir()
    elif special == "large":
        path.write_text("#" * 2_000_000)
    else:
        path = Path("/dev/zero")
    with pytest.raises(ConfigError, match=r"cannot be read: it (is|has)"):
        load_config(path)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{to_q: 0}", "must be at least 1, and is not for 'to_q'"),
        ("{to_q: x, to_k: 4}", "must be a whole number, and is not for 'to_q'"),
        ("{1: 8}", "must be text (put it in quotes), and is not for '1'"),
        ("{'': 8}", "must be text that is not empty, and is not for ''"),
        ("[to_q]", "must be names with a value each, as {to_q: 8}"),
    ],
)
def test_what_is_wrong_in_a_mapping_is_named(value, words):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"adapter.rank_pattern={value}"])
    assert [fault for fault in caught.value.faults if fault.endswith(words)], caught.value.faults


@pytest.mark.parametrize(("value", "words"), [("100000", "must be at most 16384"), ("-5", "must be at least 16")])
def test_a_number_out_of_range_is_not_advised_to_be_a_list(value: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"data_config.img_size={value}"])
    (line,) = [line for line in str(caught.value).splitlines() if "img_size" in line]
    assert words in line and "list" not in line
