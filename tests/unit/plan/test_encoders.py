"""Plans of encoding on cards of every size, decided from sizes alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pixtune.errors import CheckpointError, PlanError
from pixtune.families import FAMILIES
from pixtune.hardware.facts import GIB
from pixtune.plan.encoders import (
    ON_CPU,
    PLAINLY,
    TILE_SIDES,
    EncoderPlan,
    EncoderSizes,
    count_caption_tokens,
    decoding_bytes,
    encoding_bytes,
    fitting_tile,
    more_exact,
    plan_encoders,
    text_host_bytes,
    text_peak_bytes,
    text_weight_bytes,
)
from pixtune.plan.situation import CONTEXT_BYTES, RESERVE_BYTES
from pixtune.storage.checkpoint import read_decision
from tests.full_size import AUTOENCODER, TEXT_ENCODER

CARDS_GIB = {80: 79.0, 24: 23.3, 16: 15.3, 12: 11.4, 8: 7.4, 6: 5.4, 4: 3.5}
"""Memory of a whole process by the size of a card in GB."""


def usable(card_gb: int) -> int:
    return round(CARDS_GIB[card_gb] * GIB) - CONTEXT_BYTES - RESERVE_BYTES


def full_size(family_name: str, side: int = 1024) -> EncoderSizes:
    text = 2 * sum(TEXT_ENCODER[family_name].values())
    per_pixel = FAMILIES[family_name].encoding_bytes_per_pixel
    return EncoderSizes(
        text, 2 * AUTOENCODER[family_name], picture_pixels=side * side, encoding_bytes_per_pixel=per_pixel
    )


def peaks(plan: EncoderPlan, sizes: EncoderSizes) -> tuple[int, int]:
    """Returns the peaks of encoding captions and pictures."""
    coding = encoding_bytes(sizes, sizes.picture_pixels, plan.tile_pixels)
    return text_peak_bytes(sizes, plan.text_format), sizes.autoencoder_bytes + coding


@pytest.mark.parametrize(
    ("family_name", "card_gb", "text_format", "tile_pixels"),
    [
        ("qwen_image", 80, None, None),
        ("qwen_image", 24, None, None),
        ("qwen_image", 16, None, None),
        ("qwen_image", 12, "int8", None),
        ("qwen_image", 8, "nf4", None),
        ("qwen_image", 6, ON_CPU, None),
        ("flux", 16, None, None),
        ("flux", 12, None, None),
        ("flux", 8, "int8", None),
        ("flux", 6, "nf4", None),
        ("flux", 4, ON_CPU, None),
    ],
)
def test_a_full_size_encoder_fits_every_card_as_exactly_as_it_can(
    family_name: str, card_gb: int, text_format: str | None, tile_pixels: int | None
) -> None:
    sizes = full_size(family_name)
    plan = plan_encoders(usable(card_gb), sizes)
    assert (plan.text_format, plan.tile_pixels) == (text_format, tile_pixels)
    assert max(peaks(plan, sizes)) <= usable(card_gb)
    formats = (None, "int8", "nf4", ON_CPU)
    for more in formats[: formats.index(text_format)]:
        assert text_peak_bytes(sizes, more) > usable(card_gb), f"{more} would have fitted"
    if tile_pixels:
        whole = replace(plan, tile_pixels=None)
        assert peaks(whole, sizes)[1] > usable(card_gb), "a whole picture would have fitted"


def test_what_is_decided_has_a_reason_and_what_is_plain_has_none() -> None:
    assert plan_encoders(usable(80), full_size("qwen_image")).reasons == PLAINLY.reasons == ()
    eight, *_ = plan_encoders(usable(12), full_size("qwen_image")).reasons
    assert "text encoder in 8 bits" in eight and "13.2 GiB" in eight and "10.3 GiB are usable" in eight
    (slow,) = plan_encoders(usable(6), full_size("qwen_image")).reasons
    assert "on the CPU, which is slow" in slow


def test_the_longest_caption_decides_the_format() -> None:
    sizes = full_size("flux")
    room = text_peak_bytes(sizes, None)
    assert plan_encoders(room, sizes).text_format is None
    assert plan_encoders(room - 1, sizes).text_format == "int8"
    assert plan_encoders(room, replace(sizes, caption_tokens=4096)).text_format == "int8"


@pytest.mark.parametrize("card_gb", [6, 8])
def test_pictures_are_tiled_only_where_one_alone_does_not_fit(card_gb: int) -> None:
    sizes, room = full_size("flux", side=2048), usable(card_gb)
    plan = plan_encoders(room, sizes)
    assert plan.tile_pixels == 1024
    assert "tiles of 1024 pixels" in plan.reasons[-1]
    assert peaks(plan, sizes)[1] <= room < sizes.autoencoder_bytes + encoding_bytes(sizes, sizes.picture_pixels)
    assert plan_encoders(usable(12), sizes).tile_pixels is None


def test_a_tile_is_the_largest_that_fits_and_the_smallest_where_none_does() -> None:
    for side in TILE_SIDES:
        assert fitting_tile(4096 * 4096, decoding_bytes(side * side), decoding_bytes) == side
    assert fitting_tile(512 * 512, decoding_bytes(512 * 512), decoding_bytes) is None
    assert fitting_tile(512 * 512, 0, decoding_bytes) == TILE_SIDES[-1]


def test_a_text_encoder_that_stays_leaves_less_for_pictures() -> None:
    sizes, room = full_size("qwen_image", side=2048), usable(24)
    leaves, stays = plan_encoders(room, sizes), plan_encoders(room, sizes, text_stays=True)
    assert (leaves.tile_pixels, stays.tile_pixels) == (None, 1024)


def test_demands_are_kept() -> None:
    sizes, room = full_size("qwen_image"), usable(12)
    plain = plan_encoders(room, sizes, may_quantize=False)
    assert plain.text_format == ON_CPU and "disable_quantization" in plain.reasons[0]
    with pytest.raises(PlanError, match=r"disable_cpu_offload keeps .* at least 13\.4 GiB .* 10\.3 GiB are usable"):
        plan_encoders(room, sizes, may_quantize=False, must_stay=True)


@pytest.mark.parametrize("host_gib", [12, 20])
def test_the_cpu_is_named_as_a_way_out_only_where_it_is_one(host_gib: int) -> None:
    sizes, room = full_size("qwen_image"), usable(6)
    with pytest.raises(PlanError) as caught:
        plan_encoders(room, sizes, must_stay=True, host_bytes=host_gib * GIB)
    assert ("Leave disable_cpu_offload out" in str(caught.value)) is (host_gib == 20)
    if host_gib == 20:
        assert plan_encoders(room, sizes, host_bytes=host_gib * GIB).text_format == ON_CPU


def test_quantized_weights_are_counted_with_what_stays_as_it_is() -> None:
    sizes = full_size("qwen_image")
    embeddings_and_norms = 152_064 * 3584 + 400_000  # norms and biases
    linear = sizes.text_bytes // 2 - embeddings_and_norms
    for text_format, each in (("int8", 1 + 4 / 3584), ("nf4", 0.5 + 1 / 16)):
        exact = 2 * embeddings_and_norms + linear * each
        assert exact <= text_weight_bytes(sizes, text_format) <= 1.02 * exact


def test_better_encodings_that_are_there_are_named_best_first() -> None:
    nf4 = EncoderPlan("nf4", 512, ("4 bits",))
    found = list(more_exact(nf4))
    assert [plan.text_format for plan in found] == [ON_CPU, "int8"] and found[0].weights_format is None
    assert all(plan.tile_pixels == 512 and "in the cache" in plan.reasons[0] for plan in found)
    assert not list(more_exact(PLAINLY)) and not list(more_exact(replace(nf4, text_format=ON_CPU)))


def test_a_plan_survives_a_checkpoint() -> None:
    plan = plan_encoders(usable(8), full_size("qwen_image"))
    assert read_decision(EncoderPlan, plan.to_dict(), "encoders") == plan
    with pytest.raises(CheckpointError, match="differs from this version's in tile_pixels"):
        others = {name: value for name, value in plan.to_dict().items() if name != "tile_pixels"}
        read_decision(EncoderPlan, others, "encoders")


def test_long_captions_and_pictures_beside_them_count() -> None:
    assert count_caption_tokens(100, 0) == 512
    assert count_caption_tokens(3000, 0) == 1000
    assert count_caption_tokens(100, 28 * 28 * 7) == 519


# ---- the host


@pytest.mark.parametrize(
    ("card_gb", "host_gib", "text_format"),
    [
        (24, 4, None),
        (12, 4, "int8"),
        (8, 4, "nf4"),
        (6, 20, ON_CPU),
    ],
)
def test_16_bits_pass_through_host_memory_and_stay_there_only_to_work(
    card_gb: int, host_gib: int, text_format: str | None
) -> None:
    plan = plan_encoders(usable(card_gb), full_size("qwen_image"), host_bytes=host_gib * GIB)
    assert plan.text_format == text_format


def test_an_encoder_that_neither_side_has_room_for_is_refused_with_what_is_missing() -> None:
    sizes = full_size("qwen_image")
    with pytest.raises(
        PlanError,
        match=r"takes 13\.4 GiB .* needs 4\.9 GiB of the GPU, which has 4\.3, .* 12\.0 GiB may .* 1\.4 GiB are",
    ):
        plan_encoders(usable(6), sizes, host_bytes=12 * GIB)
    fp32 = replace(sizes, text_bytes=2 * sizes.text_bytes, element_bytes=4)
    assert text_host_bytes(fp32, "int8") == fp32.text_bytes and text_host_bytes(sizes, "int8") == 0
    with pytest.raises(PlanError, match=r"26\.3 GiB .* in fp32, and 16\.0 .* mixed_precision=bf16"):
        plan_encoders(usable(24), fp32, host_bytes=16 * GIB)
