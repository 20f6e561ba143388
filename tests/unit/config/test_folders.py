"""Several folders in a config: read as items of a list, each with its place, and filled up from `data_config`."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixtune.config import load_config, resolved_yaml
from pixtune.config.folders import folder_beside, folders_of
from pixtune.config.sections import DataConfig

HEAD = "pretrained_model_name_or_path: some/model\noutput_dir: out\nmax_train_steps: 10\n"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    found = tmp_path / "cats" / "images", tmp_path / "dogs" / "images"
    for folder in found:
        folder.mkdir(parents=True)
    return found


def test_what_a_folder_does_not_say_the_keys_beside_the_list_say(write, folders):
    cats, dogs = folders
    text = f"""{HEAD}data_config:
  img_size: 512
  caption_type: caption
  folders:
    - img_dir: {cats}
      repeats: 2
      img_size: 768
    - {{img_dir: {dogs}, name: dogs, caption_type: txt, upscale: true}}
"""
    config = load_config(write(text))
    one, other = folders_of(config.data_config)
    assert (one.label, one.img_dir, one.repeats, one.img_sizes) == ("cats/images/", cats, 2.0, (768,))
    assert (one.captions.extension, one.upscale) == ("caption", False)
    assert (other.label, other.repeats, other.img_sizes, other.upscale) == ("dogs/", 1.0, (512,), True)
    assert other.captions.extension == "txt"
    assert load_config(write(resolved_yaml(config))) == config, "what is written is read again"


def test_one_folder_is_the_flat_keys_without_a_label(folders):
    (folder,) = folders_of(DataConfig(img_dir=folders[0], img_size=512, random_ratio=True))
    assert (folder.place, folder.label, folder.img_dir, folder.repeats) == ("data_config", "", folders[0], 1.0)
    assert (folder.img_sizes, folder.random_ratio, folder.upscale, folder.control_dirs) == ((512,), True, False, ())


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["a/x", "b/y"], ["x/", "y/"]),
        (["a/x", "b/x", "b/y"], ["a/x/", "b/x/", "y/"]),
        (["a/x", "a/x"], ["x/", "x#2/"]),
        (["a/x", "a/x", "b/x", "a/x"], ["a/x/", "a/x#2/", "b/x/", "a/x#3/"]),
        (["x", "x/x"], ["x/", "x/x/"]),
    ],
)
def test_labels_are_the_shortest_ends_of_paths_that_differ(tmp_path, paths, labels):
    data = DataConfig.model_validate({"folders": [{"img_dir": str(tmp_path / path)} for path in paths]})
    found = [folder.label for folder in folders_of(data)]
    if paths == ["x", "x/x"]:
        labels = [f"{tmp_path.name}/x/", "x/x/"]
    assert found == labels


def test_held_out_pictures_have_the_settings_of_the_first_folder(tmp_path):
    data = DataConfig.model_validate(
        {"folders": [
            {"img_dir": str(tmp_path / "a"), "img_size": 256, "random_ratio": True, "repeats": 3},
            {"img_dir": str(tmp_path / "b"), "control_dir": str(tmp_path / "control")},
        ]}
    )  # fmt: skip
    folder = folder_beside(data, tmp_path / "test" / "images")
    assert (folder.img_sizes, folder.random_ratio, folder.repeats, folder.label) == ((256,), False, 1.0, "")
    assert folder.control_dirs == (tmp_path / "test" / "control",)


def test_faults_of_all_folders_are_reported_together_each_at_its_place(faults_of, folders):
    cats, dogs = folders
    text = f"""{HEAD}data_config:
  folders:
    - img_dir: {cats}
      repeats: -1
    - repeat: 2
    - img_dir: {dogs}/none
      caption_type: 3
      control_dir: {cats}
      metadata_file: x.jsonl
    - img_dir: {dogs}
      img_size: x
"""
    found = "\n".join(faults_of(text))
    assert "run.yaml:7: data_config.folders[0].repeats is -1: must be at least 0" in found
    assert "run.yaml:8: data_config.folders[1].repeat is not a known key (value 2); did you mean " in found
    assert "run.yaml:5: data_config.folders[1].img_dir is required and missing: a folder of pictures" in found
    assert "run.yaml:9: data_config.folders[2].img_dir is" in found and "there is no such folder" in found
    assert "run.yaml:10: data_config.folders[2].caption_type is 3: must be text (put it in quotes)" in found
    assert "run.yaml:12: data_config.folders[2] has both control_dir and metadata_file" in found
    assert 'run.yaml:14: data_config.folders[3].img_size is "x": must be a whole number' in found
    assert len(found.splitlines()) == 7, found


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("pictures", "data_config.folders is \"pictures\": must be a list"),
        ("{img_dir: x}", "data_config.folders is {'img_dir': 'x'}: must be a list"),
        ("[pictures]", "data_config.folders[0] is \"pictures\": it is a section with keys of its own: img_dir"),
        ("[]", "data_config.img_dir is required and missing. Folder of pictures"),
        ("", "data_config.img_dir is required and missing. Folder of pictures"),
        (f"[{', '.join(['{img_dir: .}'] * 1001)}]", "must be a list of at most 1000"),
        ("[{}]", "data_config.folders[0].img_dir is required and missing"),
        ("[{img_dir: ''}]", 'data_config.folders[0].img_dir is "": must be a path, which empty text is not'),
        ("[{img_dir: ., repeats: .nan}]", "data_config.folders[0].repeats is nan: must be a finite number"),
        ("[{img_dir: ., repeats: 1e9}]", "data_config.folders[0].repeats is 1000000000.0: must be at most 10000"),
        ("[{img_dir: ., cache_dir: x}]", "data_config.folders[0].cache_dir is not a known key"),
        ("[{img_dir: ., control_dir: [., 3]}]", "data_config.folders[0].control_dir is ['.', 3]: must be a path"),
        ("[[{img_dir: .}]]", "data_config.folders[0] is [{'img_dir': '.'}]: it is a section"),
    ],
)  # fmt: skip
def test_a_list_of_another_form_is_one_plain_sentence(faults_of, value, sentence):
    faults = [
        fault
        for fault in faults_of(HEAD, f"data_config.folders={value}")
        if "img_dir is req" not in fault or "img_dir is req" in sentence
    ]
    assert len(faults) == 1 and sentence in faults[0], faults
    assert "Input should" not in faults[0] and "[type=" not in faults[0]


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("{dataset: some/set}", "data_config.folders[0].dataset needs data_config.cache_dir"),
        ("{dataset: some/set, caption_source: file_name}", "pictures within a dataset have no names of their own"),
        ("{dataset: some/set, img_dir: .}", "data_config.folders[0] has both img_dir and dataset"),
        ("{dataset: some/set, control_dir: .}", "data_config.folders[0].control_dir is given beside dataset"),
        ("{img_dir: ., caption_text: a, caption_source: lines}", "caption_text is given and caption_source is"),
        ("{img_dir: ., img_size: [64, 32], img_size_shares: [1]}", "img_size_shares has 1 numbers and img_size 2"),
        ("{img_dir: ., img_size_shares: [1, 2]}", "img_size_shares has 2 numbers and img_size 1: give one for each"),
        ("{img_dir: ., img_size: [64, 32], img_size_shares: [0, 0]}", "img_size_shares is [0, 0]: one must be greater"),
    ],
)
def test_keys_of_a_folder_that_contradict_each_other_are_one_sentence(faults_of, folder, words):
    (fault,) = faults_of(HEAD, f"data_config.folders=[{folder}]")
    assert words in fault, fault


def test_sizes_and_captions_of_a_folder_win_over_those_beside_the_list(folders):
    cats, dogs = map(str, folders)
    data = DataConfig.model_validate(
        {"img_size": [64, 32], "img_size_shares": [3, 1], "caption_text": "all",
         "folders": [{"img_dir": cats}, {"img_dir": dogs, "img_size": 48, "caption_source": "file_name"}]}
    )  # fmt: skip
    one, other = folders_of(data)
    assert (one.img_sizes, one.size_shares, one.captions.text) == ((64, 32), (0.75, 0.25), "all")
    assert (other.img_sizes, other.size_shares) == ((48,), (1.0,))
    assert (other.captions.text, other.captions.source) == (None, "file_name")


def test_the_place_of_pictures_is_given_once(faults_of, folders):
    cats, dogs = folders
    (fault,) = faults_of(HEAD, f"data_config.img_dir={cats}", f"data_config.folders=[{{img_dir: {dogs}}}]")
    assert "data_config.img_dir and data_config.folders are both given: make that folder one of the list" in fault
    (fault,) = faults_of(HEAD, f"data_config.control_dir={cats}", f"data_config.folders=[{{img_dir: {dogs}}}]")
    assert "data_config.control_dir given beside data_config.folders: write it into its folder" in fault


def test_words_of_the_command_line_reach_into_the_list_or_replace_it(write, faults_of, folders):
    cats, dogs = folders
    text = f"{HEAD}data_config:\n  folders:\n    - {{img_dir: {cats}, repeats: 3}}\n    - {{img_dir: {dogs}}}\n"
    config = load_config(write(text), ["data_config.folders[1].repeats=0.5"])
    assert [folder.repeats for folder in config.data_config.folders] == [3.0, 0.5]
    config = load_config(write(text), [f"data_config.folders=[{{img_dir: {dogs}}}]"])
    assert [(folder.img_dir, folder.repeats) for folder in config.data_config.folders] == [(dogs, 1.0)]
    (fault,) = faults_of(text, "data_config.folders[2].repeats=2")
    assert "data_config.folders[2].repeats is given, and data_config.folders has 2 items, counted from 0" in fault
