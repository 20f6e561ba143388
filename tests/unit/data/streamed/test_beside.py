"""The encoders of a stream are planned for what the idle transformer leaves."""

from __future__ import annotations

import pytest

from pixtune.commands.plan import PlanReport, make_report
from pixtune.config import load_config
from pixtune.data.streamed.beside import BesideTransformer, encoding_room
from pixtune.plan.encoders import EncoderPlan, EncoderSizes, text_peak_bytes

WORDS = [
    "pretrained_model_name_or_path=Qwen/Qwen-Image", "output_dir=out", "max_train_steps=4", "train_batch_size=1",
    "data_config.cache_dir=cache", "data_config.img_size=1024",
    "data_config.folders=[{dataset: 'https://example.org/{00..19}.tar'}]",
]  # fmt: skip


@pytest.mark.parametrize(("card", "before", "beside"), [("H100", None, None), ("RTX 4090", None, "int8")])
def test_the_plan_counts_the_encoders_beside_the_idle_transformer(card, before, beside):
    def plan(*words: str) -> PlanReport:
        return make_report(load_config(None, [*WORDS, *words], folders_must_exist=False), card)

    whole, streamed = plan(), plan("stream.window=4096")
    assert (whole.encoders.text_format, streamed.encoders.text_format) == (before, beside)
    assert whole.plan == streamed.plan, "steps are those of any run"
    captions, pictures, step = streamed.phases
    alone = whole.phases[1].device_bytes
    idle = pictures.device_bytes - alone
    assert 0 < idle < step.device_bytes, "no activations are held between steps"
    assert captions.holds.startswith("idle transformer, ") and not streamed.too_large
    assert any("streamed: 4,096 rows" in each for each in streamed.assumptions)
    assert streamed.length.num_pictures is None and streamed.length.num_steps == 4


def test_room_for_encoding_is_what_the_larger_encoder_needs():
    sizes = EncoderSizes(16 << 30, 1 << 28, picture_pixels=1 << 20)
    assert encoding_room(sizes, EncoderPlan(None, None)) == text_peak_bytes(sizes, None) > 16 << 30
    small = encoding_room(sizes, EncoderPlan("cpu", 512))
    assert small == (1 << 28) + 512 * 512 * sizes.encoding_bytes_per_pixel


def test_captions_are_counted_as_they_are_padded():
    largest = BesideTransformer(image_tokens=100, text_tokens=70, picture_pixels=1)
    assert [largest.micro_batch_tokens(2, multiple) for multiple in (1, 64)] == [340, 456]
