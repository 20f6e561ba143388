"""Position alone decides a batch: order, draws and shares are the same however they are asked for."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import replace
from itertools import chain, count, islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pixtune.config.sections import ObjectiveConfig
from pixtune.data.batches import Batch, BatchSource, ExampleReader, read_ahead
from pixtune.data.order import BatchOrder, Signature, Turn, Use
from pixtune.families.qwen_image import QWEN_IMAGE
from pixtune.family import Conditioning, LatentDistribution
from pixtune.sizes import LatentShape, Size

WIDE, SQUARE, TALL = (96, 48), (64, 64), (48, 96)
CHANNELS = 3
DROPPED = -1.0
"""Value of the dropped caption's features in these tests; an example's are its number."""


def buckets(*counts: tuple[Size, int]) -> list[list[Signature]]:
    """One framing an example, `count` examples of each size, sizes interleaved."""
    sizes = [size for size, count in counts for _ in range(count)]
    return [[(size,)] for size in sizes[::2] + sizes[1::2]]


EVEN = buckets((WIDE, 4), (SQUARE, 8), (TALL, 4))
UNEVEN = buckets((WIDE, 3), (SQUARE, 9), (TALL, 1))
VARIANTS: list[list[Signature]] = [[(WIDE,), (SQUARE,), (SQUARE,), (TALL,)] for _ in range(12)]


def reader(sizes: Sequence[Sequence[Signature]], num_controls: int = 0, num_image_tokens: int = 16) -> ExampleReader:
    """Encodings whose values tell the example and variant they belong to."""

    def latent_shape(example: int, variant: int) -> LatentShape:
        ((width, height),) = sizes[example][variant]
        return CHANNELS, height // 8, width // 8

    def read_latents(example: int, variant: int) -> LatentDistribution:
        mean_BCHW = torch.full((1, *latent_shape(example, variant)), 100.0 * example + variant)
        return LatentDistribution(mean_BCHW, torch.full_like(mean_BCHW, 0.5))

    def read_text(example: int, variant: int, caption: int | None) -> Conditioning:
        length = 2 if caption is None else 2 + example % 3
        return {"prompt_embeds": torch.full((length, 4), DROPPED if caption is None else float(example))}

    return ExampleReader(
        read_latents=read_latents,
        read_text=read_text,
        read_controls=lambda example, variant: (
            [torch.full((1, CHANNELS, 2, 3), 10.0 * example + variant)] * num_controls
        ),
        latent_shape=latent_shape,
        stack=QWEN_IMAGE.stack_conditioning,
        time_shift=lambda height, width: height * width / 64,
        num_image_tokens=lambda height, width: num_image_tokens,
        names=[f"picture {number}" for number in range(len(sizes))],
    )


def source(sizes: list[list[Signature]] = UNEVEN, batch_size: int = 4, **changes: Any) -> BatchSource:
    objective = ObjectiveConfig(**changes.pop("objective", {}))
    order = BatchOrder(sizes, batch_size, changes.pop("seed", 42))
    return BatchSource(order, reader(sizes), objective, changes.pop("dropout", 0.0), **changes)


def batch_at(batches: BatchSource, index: int) -> Batch:
    (batch,) = batches.parts(index, batches.order.micro_batch(index))
    return batch


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.names == other.names
    for name in ("latents_BCHW", "noise_BCHW", "sigma_B"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.conditioning.keys() == other.conditioning.keys()
    assert all(torch.equal(one.conditioning[name], other.conditioning[name]) for name in one.conditioning)


# ---- the order


DATA_SETS = st.lists(
    st.lists(st.sampled_from([(WIDE,), (SQUARE,), (TALL,)]), min_size=1, max_size=4), min_size=1, max_size=30
)
"""Data sets of examples with some variants each, all of the sizes above."""
SEEDS = st.integers(0, 2**63 - 1)


@settings(max_examples=100)
@given(DATA_SETS, st.integers(1, 6), SEEDS, st.integers(0, 5))
def test_an_epoch_takes_each_example_once_and_fills_each_buckets_last_batch_evenly(
    sizes: list[list[Signature]], batch_size: int, seed: int, epoch: int
) -> None:
    micro_batches = BatchOrder(sizes, batch_size, seed).epoch(epoch)
    assert {len(batch) for batch in micro_batches} == {batch_size}
    counts = Counter(turn for batch in micro_batches for turn in batch)
    assert sorted(turn.example for turn in counts) == list(range(len(sizes))), "each in one bucket, by one variant"
    in_bucket: dict[Signature, list[int]] = {}
    for turn, times in counts.items():
        in_bucket.setdefault(sizes[turn.example][turn.variant], []).append(times)
    for each in in_bucket.values():
        assert sum(each) == math.ceil(len(each) / batch_size) * batch_size, "the fewest that fill the last batch"
        assert max(each) - min(each) <= 1, "some weigh more"
    assert all(len({sizes[turn.example][turn.variant] for turn in batch}) == 1 for batch in micro_batches)


@given(DATA_SETS, st.integers(1, 3), SEEDS, st.integers(0, 40))
def test_the_order_is_one_whatever_was_asked_before(
    sizes: list[list[Signature]], batch_size: int, seed: int, index: int
) -> None:
    """So a run that resumes at a step goes on with that step's turns. Epochs one after the other say the same."""
    asked = BatchOrder(sizes, batch_size, seed)
    asked.micro_batch(later := 3 * index)
    in_turn = chain.from_iterable(BatchOrder(sizes, batch_size, seed).epoch(epoch) for epoch in count())
    wanted = [*islice(in_turn, later + 1)]
    assert asked.micro_batch(index) == wanted[index] == BatchOrder(sizes, batch_size, seed).micro_batch(index)
    assert asked.micro_batch(later) == wanted[later]


def test_order_changes_by_epoch_and_seed_and_not_otherwise() -> None:
    epochs = [BatchOrder(EVEN, 4, seed=1).epoch(number) for number in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != BatchOrder(EVEN, 4, seed=2).epoch(0)
    assert epochs[0] == BatchOrder(EVEN, 4, seed=1).epoch(0)


def test_buckets_are_mixed_within_an_epoch() -> None:
    """All wide pictures first would be a curriculum nobody asked for."""
    order = BatchOrder(buckets((WIDE, 32), (SQUARE, 32)), 2, seed=3)
    first_half = [order.buckets[batch[0].example][0] for batch in order.epoch(0)[:16]]
    assert 4 <= first_half.count((WIDE,)) <= 12


def test_batch_mates_change_by_epoch() -> None:
    order = BatchOrder(buckets((SQUARE, 16)), 4, seed=3)
    mates = [{frozenset(turn.example for turn in batch) for batch in order.epoch(epoch)} for epoch in range(2)]
    assert not mates[0] & mates[1]


def test_all_variants_occur_equally_often() -> None:
    order = BatchOrder(VARIANTS, 1, seed=0)
    counts = Counter(turn.variant for epoch in range(100) for batch in order.epoch(epoch) for turn in batch)
    assert counts.keys() == {0, 1, 2, 3}
    assert all(250 < count < 350 for count in counts.values()), counts  # 300 each expected, deviation 15


def test_an_example_changes_its_variant_by_epoch_and_independently_of_others() -> None:
    order = BatchOrder(VARIANTS, 1, seed=0)
    variant_of = [{d.example: d.variant for batch in order.epoch(epoch) for d in batch} for epoch in range(30)]
    assert len({variants[0] for variants in variant_of}) == 4
    assert len(set(variant_of[0].values())) > 1


def test_epochs_of_varying_length_are_found_from_any_index_in_any_order() -> None:
    # The number of short batches depends on the variants drawn.
    sizes: list[list[Signature]] = [[(WIDE,), (SQUARE,)] for _ in range(7)]
    forward = BatchOrder(sizes, 4, seed=5)
    lengths = [len(forward.epoch(epoch)) for epoch in range(12)]
    assert len(set(lengths)) > 1, "epochs of one length would not test the search"
    expected = [epoch for epoch, length in enumerate(lengths) for _ in range(length)]
    order = [(7 * number) % len(expected) for number in range(len(expected))]
    assert sorted(order) == list(range(len(expected)))
    jumping = BatchOrder(sizes, 4, seed=5)
    assert [jumping.epoch_of(index) for index in order] == [expected[index] for index in order]
    assert [jumping.epoch_of(index) for index in range(len(expected))] == expected
    assert BatchOrder(sizes, 4, seed=5).epoch_of(len(expected) - 1) == 11
    assert [jumping.epoch_end(epoch) for epoch in range(12)] == [sum(lengths[: e + 1]) for e in range(12)]
    in_order = [batch for epoch in range(12) for batch in forward.epoch(epoch)]
    assert [jumping.micro_batch(index) for index in order] == [in_order[index] for index in order]


# ---- what is drawn


def test_latents_are_a_draw_of_their_own_distribution() -> None:
    batch = batch_at(source(), 3)
    order = source().order
    for row, turn in enumerate(order.micro_batch(3)):
        drawn = (batch.latents_BCHW[row] - 100.0 * turn.example - turn.variant) / 0.5
        assert 0.7 < drawn.std() < 1.3 and drawn.abs().max() < 5
        length = 2 + turn.example % 3
        assert (batch.conditioning["prompt_embeds"][row, :length] == turn.example).all()
        assert batch.names[row] == f"picture {turn.example}"


def test_latents_noise_and_sigma_are_drawn_apart_for_each_slot_and_batch() -> None:
    """An example met twice, also twice in one batch, gets other noise, sigma and latents."""
    batches = source(buckets((TALL, 1)))  # one picture fills all four slots
    drawn = [batch_at(batches, index) for index in range(3)]
    rows = [tensor for batch in drawn for tensor in batch.latents_BCHW - batch.latents_BCHW.round(decimals=-2)]
    noises = [tensor for batch in drawn for tensor in batch.noise_BCHW]
    for tensors in (rows, noises):
        correlation = torch.corrcoef(torch.stack([tensor.flatten() for tensor in tensors]))
        assert (correlation - torch.eye(len(tensors))).abs().max() < 0.4  # 216 numbers: deviation 0.07
    together = torch.corrcoef(torch.stack([torch.cat(rows).flatten(), torch.cat(noises).flatten()]))
    assert abs(together[0, 1]) < 0.1
    assert len({sigma.item() for batch in drawn for sigma in batch.sigma_B}) == 12


def test_another_seed_draws_everything_anew() -> None:
    one, other = (batch_at(source(buckets((TALL, 1)), seed=seed), 0) for seed in (1, 2))
    for name in ("latents_BCHW", "noise_BCHW", "sigma_B"):
        assert not torch.isclose(getattr(one, name), getattr(other, name)).any()


def sigmas(count: int = 400, **objective: object) -> Tensor:
    batches = source(buckets((SQUARE, 4)), objective=objective)
    return torch.cat([batch_at(batches, index).sigma_B for index in range(count // 4)])


def test_the_objectives_distribution_and_its_settings_reach_the_draws() -> None:
    uniform = sigmas(sigma_distribution="uniform", shift="none")
    assert uniform.min() < 0.03 and uniform.max() > 0.97 and abs(uniform.mean() - 0.5) < 0.06
    normal = torch.special.ndtri(uniform.double())
    expected = torch.sigmoid(-0.7 + 0.5 * normal).float()
    given = sigmas(sigma_distribution="logit_normal", logit_mean=-0.7, logit_std=0.5, shift="none")
    torch.testing.assert_close(given, expected)
    mode = sigmas(sigma_distribution="mode", mode_scale=0.8, shift="none")
    expected = 1 - uniform - 0.8 * (torch.cos(math.pi * uniform / 2) ** 2 - 1 + uniform)
    torch.testing.assert_close(mode, expected)


@pytest.mark.parametrize(("shift", "mu"), [("model", 8 * 8 / 64), (0.6, 0.6), ("none", 0.0)])
def test_the_shift_of_the_config_is_applied(shift: object, mu: float) -> None:
    """`model` asks the family with the latents' height and width."""
    plain = sigmas(count=40, sigma_distribution="uniform", shift="none")
    shifted = sigmas(count=40, sigma_distribution="uniform", shift=shift)
    torch.testing.assert_close(shifted, math.exp(mu) * plain / (1 + (math.exp(mu) - 1) * plain))


def test_the_models_shift_gets_height_and_width_in_this_order() -> None:
    asked: list[tuple[int, int]] = []
    batches = source(buckets((WIDE, 4)))

    def time_shift(height: int, width: int) -> float:
        asked.append((height, width))
        return 0.0

    noting = replace(batches.reader, time_shift=time_shift)
    BatchSource(batches.order, noting, ObjectiveConfig(shift="model"), 0.0).parts(0, batches.order.micro_batch(0))
    assert set(asked) == {(48 // 8, 96 // 8)}


# ---- caption dropout


def dropped_rows(batch: Batch) -> Tensor:
    return batch.conditioning["prompt_embeds"][:, 0, 0] == DROPPED


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_captions_are_dropped_at_the_configured_rate(rate: float) -> None:
    batches = source(EVEN, dropout=rate)
    dropped = torch.cat([dropped_rows(batch_at(batches, index)) for index in range(250)]).float().mean()
    assert abs(dropped - rate) <= (0.05 if 0 < rate < 1 else 0)  # 1000 draws: deviation at most 0.016


def test_an_examples_own_rate_of_dropped_captions_wins() -> None:
    order = BatchOrder(EVEN, 4, 42, [Use(caption_dropout_rate=float(number % 2)) for number in range(len(EVEN))])
    batches = BatchSource(order, reader(EVEN), ObjectiveConfig(), 0.5)
    for index in range(5):
        dropped = dropped_rows(batch_at(batches, index)).tolist()
        assert dropped == [turn.example % 2 == 1 for turn in order.micro_batch(index)]


def test_captions_of_one_batch_and_of_one_slot_are_dropped_apart() -> None:
    batches = source(EVEN, dropout=0.5)
    dropped = torch.stack([dropped_rows(batch_at(batches, index)) for index in range(250)]).float()
    assert dropped.std(0).min() > 0.4 and 0.4 < dropped.mean() < 0.6, "slots change from batch to batch"
    assert (torch.corrcoef(dropped.T) - torch.eye(4)).abs().max() < 0.25  # deviation 0.06


def test_only_the_dropped_rows_lose_their_caption_and_nothing_else_changes() -> None:
    found = 0
    for index in range(20):
        with_captions, dropping = batch_at(source(EVEN), index), batch_at(source(EVEN, dropout=0.5), index)
        assert torch.equal(with_captions.latents_BCHW, dropping.latents_BCHW)
        assert torch.equal(with_captions.noise_BCHW, dropping.noise_BCHW)
        assert torch.equal(with_captions.sigma_B, dropping.sigma_B)
        lost = dropped_rows(dropping)
        found += int(lost.sum())
        for row in range(4):
            if lost[row]:
                mask = dropping.conditioning.get("prompt_embeds_mask")
                length = 2 if mask is None else int(mask[row].sum())
                assert length == 2, "the dropped caption's own length"
            else:
                shared = min(c.conditioning["prompt_embeds"].shape[1] for c in (with_captions, dropping))
                assert torch.equal(
                    with_captions.conditioning["prompt_embeds"][row, :shared],
                    dropping.conditioning["prompt_embeds"][row, :shared],
                )
    assert 20 < found < 60


# ---- shares


@pytest.mark.parametrize("world_size", [2, 4])
def test_shares_of_several_processes_are_the_one_batch_bit_for_bit(world_size: int) -> None:
    whole = source(batch_size=8, dropout=0.3)
    shares = [source(batch_size=8, dropout=0.3, rank=rank, world_size=world_size) for rank in range(world_size)]
    for index in range(12):
        expected = batch_at(whole, index)
        parts = [batch_at(share, index) for share in shares]
        assert {len(part.names) for part in parts} == {8 // world_size}
        assert [name for part in parts for name in part.names] == expected.names
        for name in ("latents_BCHW", "noise_BCHW", "sigma_B"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(expected, name))
        rows = [row for part in parts for row in part.conditioning["prompt_embeds"]]
        for row, expected_row in zip(rows, expected.conditioning["prompt_embeds"], strict=True):
            assert torch.equal(row, expected_row[: len(row)]) and not expected_row[len(row) :].any()


# ---- control pictures


def test_examples_meet_only_where_target_and_all_controls_have_equal_sizes() -> None:
    one, other, without = (SQUARE, SQUARE), (SQUARE, WIDE), (SQUARE,)
    order = BatchOrder([[signature] for signature in (one, other, without) * 5], 2, seed=0)
    for index in range(40):
        first, second = (order.buckets[turn.example] for turn in order.micro_batch(index))
        assert first == second


@pytest.mark.parametrize("num_controls", [0, 1, 3])
def test_each_control_becomes_a_tensor_of_its_own_with_its_examples_rows(num_controls: int) -> None:
    order = BatchOrder(EVEN, 4, seed=1)
    batch = batch_at(BatchSource(order, reader(EVEN, num_controls), ObjectiveConfig(), 0.0), 0)
    assert len(batch.controls) == num_controls
    expected = torch.tensor([10.0 * turn.example for turn in order.micro_batch(0)])
    for control_BCHW in batch.controls:
        assert control_BCHW.shape == (4, CHANNELS, 2, 3)
        assert torch.equal(control_BCHW[:, 0, 0, 0], expected)


# ---- mixed text lengths


def test_large_examples_of_mixed_text_length_are_split_and_never_masked() -> None:
    small, large = source(EVEN), BatchSource(source(EVEN).order, reader(EVEN, 1, 1024), ObjectiveConfig(), 0.0)
    masked = 0
    for index in range(8):
        whole, parts = batch_at(small, index), large.parts(index, large.order.micro_batch(index))
        masked += "prompt_embeds_mask" in whole.conditioning
        assert all("prompt_embeds_mask" not in part.conditioning for part in parts)
        assert len(parts) == len({len(row) for part in parts for row in part.conditioning["prompt_embeds"]})
        order = [whole.names.index(name) for part in parts for name in part.names]
        assert sorted(order) == list(range(4))
        for name in ("latents_BCHW", "noise_BCHW", "sigma_B"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)[order])
    assert masked > 2, "equal lengths everywhere would prove nothing"


@pytest.mark.parametrize("num_image_tokens", [16, 1024])
def test_texts_that_are_padded_to_a_multiple_are_one_batch_of_one_shape(num_image_tokens: int) -> None:
    """Of the dropped caption, which is shorter than most, too. Then one recording serves them."""
    order = BatchOrder(EVEN, 4, seed=1)
    batches = BatchSource(order, reader(EVEN, 0, num_image_tokens), ObjectiveConfig(), 0.3, text_multiple=8)
    shapes, lengths = set(), set()
    for index in range(12):
        (batch,) = batches.parts(index, order.micro_batch(index))
        real = batch.conditioning["prompt_embeds_real"]
        assert batch.conditioning["prompt_embeds"].shape[:2] == real.shape == (4, 8)
        assert all(tensor is not None for tensor in batch.tensors()) and any(t is real for t in batch.tensors())
        lengths.update(real.sum(dim=1).tolist())
        shapes.add(batch.shapes)
    assert lengths == {2, 3, 4} and len(shapes) == len({sizes[0] for sizes in EVEN})


# ---- reading ahead


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 1, 13])
def test_any_start_and_any_number_of_workers_give_the_same_batches(num_workers: int, start: int) -> None:
    settings: dict[str, Any] = {"sizes": [[(WIDE,), (SQUARE,)] for _ in range(7)], "dropout": 0.3}
    reference = source(**settings)
    expected = [batch_at(reference, index) for index in range(20)]
    given = list(read_ahead(source(**settings), start, 20, num_workers, pin_memory=False))
    assert len(given) == 20 - start
    for (one,), other in zip(given, expected[start:], strict=True):
        assert_equal(one, other)


class BrokenSource(BatchSource):
    """Fails at batch 5, and counts what it was asked for."""

    made: list[int]

    def parts(self, index: int, members: Sequence[Turn]) -> list[Batch]:
        self.__dict__.setdefault("made", []).append(index)
        if index == 5:
            raise OSError("picture 3 vanished")
        return super().parts(index, members)


def read_ahead_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_failing_read_surfaces_after_the_batches_before_it_and_ends_the_pool(num_workers: int) -> None:
    good = source()
    broken = BrokenSource(good.order, good.reader, good.objective, 0.0)
    batches = read_ahead(broken, 0, 1000, num_workers, pin_memory=False)
    for index in range(5):
        (batch,) = next(batches)
        assert_equal(batch, batch_at(good, index))
    with pytest.raises(OSError, match="picture 3 vanished") as caught:
        next(batches)
    assert any("parts" in frame.name for frame in caught.traceback), "the traceback shows where"
    with pytest.raises(StopIteration):
        next(batches)
    for thread in read_ahead_threads():
        thread.join(timeout=10)
    assert not read_ahead_threads()
    assert len(broken.__dict__["made"]) < 20, "it read on after the failure"


def test_workers_read_ahead_but_not_without_bound() -> None:
    good = source()
    counting = BrokenSource(good.order, good.reader, good.objective, 0.0)
    batches = read_ahead(counting, 10, 1000, 3, pin_memory=False)
    assert isinstance(batches, Generator)
    next(batches)
    batches.close()
    for thread in read_ahead_threads():
        thread.join(timeout=10)
    assert not read_ahead_threads()
    assert len(counting.__dict__["made"]) <= 7


def test_a_batch_moves_whole() -> None:
    batch = batch_at(source(), 0).to(torch.device("meta"))
    tensors = [batch.latents_BCHW, batch.noise_BCHW, batch.sigma_B, *batch.conditioning.values()]
    assert "prompt_embeds_mask" in batch.conditioning and len(tensors) == 5
    assert {tensor.device.type for tensor in tensors} == {"meta"}


# ---- weights of the loss


def weighed(batch_size: int = 4, **changes: Any) -> BatchSource:
    """A source whose examples have masks and factors, told by the example's number."""
    plain = source(batch_size=batch_size, **changes)

    def read_weights(example: int, variant: int) -> torch.Tensor:
        _, height, width = plain.reader.latent_shape(example, variant)
        return torch.full((1, 1, height, width), float(example))

    factors = [10.0 + number for number in range(len(plain.reader.names))]
    return replace(plain, reader=replace(plain.reader, read_weights=read_weights, example_weights=factors))


def test_weights_travel_with_their_examples() -> None:
    batch = batch_at(weighed(), 0)
    numbers = [float(name.removeprefix("picture ")) for name in batch.names]
    assert batch.weights_B1HW is not None and batch.example_weight_B is not None
    assert batch.weights_B1HW.shape == (4, 1, *batch.latents_BCHW.shape[-2:])
    assert batch.weights_B1HW[:, 0, 0, 0].tolist() == numbers
    assert batch.example_weight_B.tolist() == [10 + number for number in numbers]
    for part, rows in zip(batch.parts(2), (slice(0, 2), slice(2, 4)), strict=True):
        assert part.weights_B1HW is not None and torch.equal(part.weights_B1HW, batch.weights_B1HW[rows])
        assert part.example_weight_B is not None and torch.equal(part.example_weight_B, batch.example_weight_B[rows])
    assert batch.tensors()[-2] is batch.weights_B1HW and batch.tensors()[-1] is batch.example_weight_B
    doubled = batch.map(lambda tensor: tensor * 2).tensors()
    assert all(torch.equal(two, 2 * one) for two, one in zip(doubled, batch.tensors(), strict=True))


def test_weights_change_nothing_else_and_are_absent_without() -> None:
    plain, with_weights = batch_at(source(), 3), batch_at(weighed(), 3)
    assert_equal(plain, with_weights)
    assert plain.weights_B1HW is None and plain.example_weight_B is None
    assert len(plain.tensors()) == len(with_weights.tensors()) - 2
    assert plain.shapes == with_weights.shapes, "one capture a shape, since weights are in all batches or in none"


@pytest.mark.parametrize("shift", ["model", "none", 1.0])
def test_a_range_of_sigmas_maps_each_draw(shift: object) -> None:
    whole = batch_at(source(objective={"shift": shift}), 5)
    within = source(objective={"shift": shift, "min_sigma": 0.25, "max_sigma": 0.75})
    torch.testing.assert_close(batch_at(within, 5).sigma_B, 0.25 + 0.5 * whole.sigma_B)
    assert torch.equal(within.times(5, ())[0], batch_at(within, 5).sigma_B), "what is computed ahead is what is used"
