"""A stream refuses what it cannot honour, before anything is read."""

from __future__ import annotations

import pytest

from pixtune.bench.synthetic import SyntheticData, timing_words
from pixtune.config import load_config
from pixtune.errors import ConfigError

STREAMED = [
    "pretrained_model_name_or_path=x", "output_dir=out", "max_train_steps=4", "stream.window=8",
    "data_config.cache_dir=cache", "data_config.folders=[{dataset: 'https://example.org/{00..19}.tar'}]",
]  # fmt: skip


def test_a_stream_of_shards_is_a_config():
    config = load_config(None, STREAMED, folders_must_exist=False)
    assert config.stream.window == 8 and config.stream.shards_at_once == 8


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["max_train_steps=null"], "its run needs max_train_steps"),
        (["num_train_epochs=3"], "Give its length as max_train_steps alone"),
        (["max_train_steps=null", "num_train_epochs=3"], "Give its length as max_train_steps alone"),
        (["data_config.folders=[{dataset: a}, {img_dir: b}]"], "a stream is the only one"),
        (["data_config.folders=[{dataset: a, repeats: 2}]"], "folders[0].repeats given beside stream.window"),
        (["data_config.folders=[{dataset: a, mask: alpha}]"], "folders[0].mask given beside stream.window"),
        (["data_config.mask=alpha"], "masks of a stream are not read"),
        (["save_cache_on_disk=false"], "save_cache_on_disk false beside stream.window"),
        (["precompute_text_embeddings=false"], "precompute_text_embeddings false beside stream.window"),
        (["validation.held_out=0.1"], "nobody knows a share of a stream"),
        (["validation.judge_captions=true"], "captions are judged where a run knows all of them"),
        (["prior_preservation.prompts=[a cat]"], "put regularization pictures into the stream's shards"),
        (["data_config.exclude=[a]", "data_config.loss_weights={a: 2}"], "exclude and loss_weights given beside"),
        (["random_weights=true"], "nothing is read"),
        (["stream.window=null", "stream.shards_at_once=2"], "stream.window absent: nothing is streamed"),
        (["stream.window=0"], "stream.window"),
        (["stream.skipped_share=2"], "stream.skipped_share"),
        (["stream.cache_limit_gib=0"], "stream.cache_limit_gib"),
    ],
)
def test_what_a_stream_cannot_honour_is_refused_by_name(words, sentence):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*STREAMED, *words], folders_must_exist=False)
    assert sentence in str(caught.value)


def test_all_that_is_wrong_is_said_at_once():
    words = ["num_train_epochs=3", "save_cache_on_disk=false", "data_config.mask=alpha"]
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*STREAMED, *words], folders_must_exist=False)
    assert len(caught.value.faults) == 3


def test_a_timing_of_a_streamed_config_streams_nothing(tmp_path):
    words = timing_words(tmp_path, SyntheticData(tmp_path, ()), 3, 64, None)
    config = load_config(None, [*STREAMED, "stream.shards_at_once=2", *words])
    assert config.stream.window is None and config.data_config.img_dir == tmp_path
