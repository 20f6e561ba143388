"""Nothing stale is read, nothing is encoded twice, every miss says why, and a full disk leaves no half of a file."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixtune.config.schema import TrainConfig
from pixtune.data import cache
from pixtune.data.buckets import Framing, build_buckets, frame_picture
from pixtune.data.cache import CacheKey, DiskStore, Entry, Ledger, MemoryStore, Store, fill
from pixtune.data.encode import Encoder, FramedPicture
from pixtune.data.prepare import prepare_data
from pixtune.errors import WriteError
from pixtune.families.base import LatentDistribution, Placement
from pixtune.families.qwen_image import QwenImage
from pixtune.weights import ModelFolder

ENTRY = {"mean": torch.arange(6.0).view(1, 2, 3), "half": torch.ones(2).bfloat16()}


def key(item: str = "a.png", **parts: str) -> CacheKey:
    return CacheKey(item, {"kind": "latents", "picture": "p0", "size": "64x64", **parts})


def count_encodings(made: list[str]) -> Callable[[Sequence[CacheKey]], Iterator[tuple[CacheKey, Entry]]]:
    def encode(missing: Sequence[CacheKey]) -> Iterator[tuple[CacheKey, Entry]]:
        made.append("loaded")
        for one in missing:
            made.append(one.item)
            yield one, ENTRY

    return encode


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return DiskStore(tmp_path / "entries") if request.param == "disk" else MemoryStore()


# ---- keys


def test_every_part_and_its_name_decide_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key().digest
    assert before == key().digest
    assert len({before, key(picture="p1").digest, key(size="64x48").digest, key(more="x").digest}) == 4
    assert CacheKey("a", {"x": "1", "y": "2"}).digest != CacheKey("a", {"x": "2", "y": "1"}).digest
    assert CacheKey("a", {"x": "1", "y": "2"}).digest == CacheKey("a", {"y": "2", "x": "1"}).digest
    monkeypatch.setattr(cache, "CODE_VERSION", "other")
    assert key().digest != before


def test_the_name_that_a_person_reads_does_not_decide_the_key() -> None:
    """A renamed picture is not encoded again."""
    assert key("a.png").digest == key("b.png").digest


# ---- stores


def test_an_entry_is_read_back_as_it_was_written(store: Store) -> None:
    assert not store.has("ab12")
    store.write("ab12", ENTRY)
    assert store.has("ab12") and not store.has("ab13")
    entry = store.read("ab12")
    assert entry.keys() == ENTRY.keys()
    for name, tensor in ENTRY.items():
        assert entry[name].dtype == tensor.dtype and torch.equal(entry[name], tensor)


def test_rows_of_a_batch_and_gradients_do_not_come_along(store: Store) -> None:
    batch = torch.arange(12.0, requires_grad=True).view(3, 4)
    store.write("ab12", {"row": batch[1:2], "turned": batch.T})
    entry = store.read("ab12")
    assert torch.equal(entry["row"], torch.tensor([[4.0, 5, 6, 7]])) and not entry["row"].requires_grad
    assert torch.equal(entry["turned"], batch.detach().T)


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_empty(path: Path) -> None:
    path.write_bytes(b"")


def damage_text(path: Path) -> None:
    path.write_text("not tensors at all, but long enough for a header")


@pytest.mark.parametrize("damage", [damage_cut, damage_empty, damage_text, Path.unlink])
def test_a_damaged_or_deleted_entry_is_made_anew(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    store, ledger = DiskStore(tmp_path / "entries"), Ledger(tmp_path / "ledger.json")
    keys = [key("a.png"), key("b.png", picture="p1")]
    fill(store, ledger, keys, count_encodings([]))
    (file,) = (tmp_path / "entries").rglob(f"{keys[0].digest}.safetensors")
    damage(file)
    made: list[str] = []
    report = fill(store, ledger, keys, count_encodings(made))
    assert made == ["loaded", "a.png"]
    assert (report.hits, report.misses) == (1, {"deleted or damaged": 1})
    assert torch.equal(store.read(keys[0].digest)["mean"], ENTRY["mean"])


# ---- filling


def test_encoders_are_not_loaded_when_nothing_is_missing(store: Store) -> None:
    made: list[str] = []
    keys = [key("a.png"), key("b.png", picture="p1")]
    first = fill(store, Ledger(None), keys, count_encodings(made))
    assert made == ["loaded", "a.png", "b.png"] and (first.hits, first.misses) == (0, {"new": 2})
    second = fill(store, Ledger(None), keys, count_encodings(made))
    assert len(made) == 3 and (second.hits, second.misses) == (2, {})


def test_equal_content_under_two_names_is_encoded_once(store: Store) -> None:
    made: list[str] = []
    report = fill(store, Ledger(None), [key("a.png"), key("copy.png")], count_encodings(made))
    assert len(made) == 2 and sum(report.misses.values()) == 1 and report.hits == 0
    assert fill(store, Ledger(None), [key("a.png"), key("copy.png")], count_encodings(made)).hits == 1


def test_what_was_encoded_before_a_crash_is_kept(store: Store) -> None:
    def breaks_off(missing: Sequence[CacheKey]) -> Iterator[tuple[CacheKey, Entry]]:
        yield missing[0], ENTRY
        raise KeyboardInterrupt

    keys = [key("a.png"), key("b.png", picture="p1")]
    with pytest.raises(KeyboardInterrupt):
        fill(store, Ledger(None), keys, breaks_off)
    made: list[str] = []
    fill(store, Ledger(None), keys, count_encodings(made))
    assert made == ["loaded", "b.png"]


def test_every_miss_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DiskStore(tmp_path / "entries")

    def reasons(*keys: CacheKey) -> dict[str, int]:
        return fill(store, Ledger(tmp_path / "ledger.json"), keys, count_encodings([])).misses

    assert reasons(key("a.png"), key("b.png", picture="p1")) == {"new": 2}
    assert reasons(key("a.png"), key("b.png", picture="p1")) == {}
    assert reasons(key("a.png", picture="p2"), key("c.png", picture="p3")) == {"changed: picture": 1, "new": 1}
    assert reasons(key("a.png", picture="p4", size="32x32")) == {"changed: picture, size": 1}
    monkeypatch.setattr(cache, "CODE_VERSION", "other")
    assert reasons(key("a.png", picture="p4", size="32x32")) == {"changed: code": 1}


def test_the_report_is_one_readable_line() -> None:
    report = cache.FillReport(hits=3, misses={"new": 2, "changed: picture": 1})
    assert str(report) == "3 from the cache, 3 encoded (1 changed: picture; 2 new)"
    assert str(cache.FillReport(5, {})) == "5 from the cache, 0 encoded"


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"a.png": "text"}', "\xff"])
def test_a_damaged_ledger_costs_reasons_and_nothing_else(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ledger.json"
    path.write_text(text, encoding="latin-1")
    store = MemoryStore()
    with caplog.at_level(logging.WARNING):
        report = fill(store, Ledger(path), [key()], count_encodings([]))
    assert report.misses == {"new": 1} and "ledger.json is damaged" in caplog.text
    store = MemoryStore()
    assert fill(store, Ledger(path), [key()], count_encodings([])).misses == {"deleted or damaged": 1}


def test_the_ledger_never_decides_what_is_used(tmp_path: Path) -> None:
    store, path = DiskStore(tmp_path / "entries"), tmp_path / "ledger.json"
    fill(store, Ledger(path), [key()], count_encodings([]))
    path.unlink()
    made: list[str] = []
    assert fill(store, Ledger(path), [key()], count_encodings(made)).hits == 1 and not made
    made = []
    fill(MemoryStore(), Ledger(path), [key()], count_encodings(made))
    assert made == ["loaded", "a.png"]


# ---- a full disk


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_no_part_of_a_file_and_the_older_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = DiskStore(tmp_path / "entries")
    store.write("ab12", ENTRY)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    monkeypatch.setattr(Path, "replace", full) if call == "replace" else None
    for digest in ("ab12", "cd34"):
        with pytest.raises(WriteError, match=rf"{digest}\.safetensors could not be written .*No space left"):
            store.write(digest, {"mean": torch.zeros(9)})
    monkeypatch.undo()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["ab12.safetensors"]
    assert torch.equal(store.read("ab12")["mean"], ENTRY["mean"]) and not store.has("cd34")


# ---- the keys of real captions and pictures, and what is encoded for them


@dataclass
class CountingFamily(QwenImage):
    """Counts; a caption's features are its length, a picture's mean its own mean."""

    loaded: list[str] = field(default_factory=list)
    encoded: list[str] = field(default_factory=list)
    prompt_template: str = "template {}"

    def load_text_encoder(self, folder: ModelFolder, placement: Placement) -> Any:
        self.loaded.append("text encoder")
        return None

    def load_autoencoder(self, folder: ModelFolder, placement: Placement) -> Any:
        self.loaded.append("autoencoder")
        return None

    def encode_text(self, encoder: Any, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        self.encoded += prompts
        return [{"prompt_embeds": torch.full((2, 3), float(len(prompt)))} for prompt in prompts]

    def encode_images(self, autoencoder: Any, pixels_B3HW: Tensor) -> LatentDistribution:
        mean_B111 = pixels_B3HW.mean((1, 2, 3), keepdim=True)
        self.encoded += [f"{value:.2f}" for value in mean_B111.flatten().tolist()]
        height, width = pixels_B3HW.shape[-2] // 8, pixels_B3HW.shape[-1] // 8
        mean_BCHW = mean_B111.expand(-1, 2, height, width)
        return LatentDistribution(mean_BCHW, 0.25 + 0 * mean_BCHW)


@pytest.fixture
def model(tmp_path: Path) -> ModelFolder:
    """A folder with the parts whose content is in the keys."""
    path = tmp_path / "model"
    for part in ("text_encoder", "tokenizer", "vae"):
        (path / part).mkdir(parents=True)
        (path / part / "config.json").write_text('{"temperal_downsample": [1, 1, 1], "z_dim": 2}')
        save_file({"weight": torch.zeros(4)}, path / part / "model.safetensors")
    return ModelFolder(path)


@pytest.fixture
def encoder(tmp_path: Path, model: ModelFolder) -> Encoder:
    return Encoder(
        family=CountingFamily(),
        folder=model,
        placement=Placement(torch.device("cpu"), torch.float32),
        batch_size=2,
        store=DiskStore(tmp_path / "entries"),
        ledger=Ledger(tmp_path / "ledger.json"),
        console=Console(quiet=True),
        memo_dir=None,
    )


FRAMING = frame_picture(64, 64, build_buckets(64, 16))


def picture(folder: Path, name: str, grey: int, framing: Framing = FRAMING) -> FramedPicture:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), (grey, grey, grey)).save(path)
    return FramedPicture(name, path, cache.file_digest(path), framing)


def other_weights(folder: ModelFolder, part: str) -> None:
    save_file({"weight": torch.ones(4)}, folder.path / part / "model.safetensors")


def other_config(folder: ModelFolder, part: str) -> None:
    (folder.path / part / "config.json").write_text('{"latents_mean": [1]}')


def text_digest(encoder: Encoder, text: str = "a fox") -> str:
    (made,) = encoder.text_keys([text])
    return made.digest


@pytest.mark.parametrize("change", [other_weights, other_config])
@pytest.mark.parametrize(("part", "of_text"), [("text_encoder", True), ("tokenizer", True), ("vae", False)])
def test_other_weights_or_config_of_an_encoder_change_its_keys_alone(
    encoder: Encoder, tmp_path: Path, change: Callable[[ModelFolder, str], None], part: str, of_text: bool
) -> None:
    framed = picture(tmp_path, "a.png", 10)
    text, latents = text_digest(encoder), encoder.latent_keys([framed])[0].digest
    change(encoder.folder, part)
    assert (text_digest(encoder) != text) == of_text
    assert (encoder.latent_keys([framed])[0].digest != latents) == (not of_text)


def test_caption_template_and_number_format_change_the_texts_key(encoder: Encoder) -> None:
    before = text_digest(encoder)
    assert text_digest(replace(encoder, batch_size=7)) == before
    bf16 = replace(encoder, placement=Placement(torch.device("cpu"), torch.bfloat16))
    template = replace(encoder, family=CountingFamily(prompt_template="Template {}"))
    assert len({before, text_digest(encoder, "a fox "), text_digest(bf16), text_digest(template)}) == 4


def test_bytes_size_crop_and_number_format_change_the_pictures_key(encoder: Encoder, tmp_path: Path) -> None:
    def digest(framed: FramedPicture, by: Encoder = encoder) -> str:
        return by.latent_keys([framed])[0].digest

    framed = picture(tmp_path, "a.png", 10)
    before = digest(framed)
    renamed = FramedPicture("b.png", tmp_path / "b.png", framed.digest, framed.framing)
    assert digest(renamed) == before
    crop = replace(framed, framing=replace(FRAMING, crop_box=(0.0, 0.0, 63.0, 63.0)))
    size = replace(framed, framing=replace(FRAMING, width=48))
    bf16 = replace(encoder, placement=Placement(torch.device("cpu"), torch.bfloat16))
    changed = [digest(crop), digest(size), digest(framed, bf16), digest(picture(tmp_path, "a.png", 11))]
    assert len({before, *changed}) == 5


def test_one_changed_caption_reencodes_one_caption(encoder: Encoder) -> None:
    texts = ["a fox", "an owl", "a bear"]
    encoder.fill_texts(texts, encoder.text_keys(texts))
    family = encoder.family
    assert isinstance(family, CountingFamily)
    assert sorted(family.encoded) == sorted(texts) and family.loaded == ["text encoder"]
    family.encoded.clear()
    texts[1] = "an owl at night"
    report = encoder.fill_texts(texts, encoder.text_keys(texts))
    assert family.encoded == ["an owl at night"] and report.hits == 2
    assert encoder.store.read(text_digest(encoder, "an owl at night"))["prompt_embeds"][0, 0] == 15
    encoder.fill_texts(texts, encoder.text_keys(texts))
    assert family.loaded == ["text encoder"] * 2 and len(family.encoded) == 1


def test_pictures_are_stored_as_mean_and_deviation_each_under_its_own_key(encoder: Encoder, tmp_path: Path) -> None:
    """A stored sample would make every epoch's latents the same."""
    wide = frame_picture(64, 32, build_buckets(64, 16))
    pictures = [picture(tmp_path, f"{grey}.png", grey) for grey in (0, 255, 102)]
    pictures.append(picture(tmp_path, "wide.png", 204, wide))
    keys = encoder.latent_keys(pictures)
    encoder.fill_pictures(pictures, keys)
    for made, mean, framing in zip(keys, (-1.0, 1.0, -0.2, 0.6), (FRAMING, FRAMING, FRAMING, wide), strict=True):
        entry = load_file(next(tmp_path.rglob(f"{made.digest}.safetensors")))
        assert entry.keys() == {"mean", "std"}
        assert entry["mean"].shape == entry["std"].shape == (1, 2, framing.height // 8, framing.width // 8)
        torch.testing.assert_close(entry["mean"], torch.full_like(entry["mean"], mean))
        assert (entry["std"] == 0.25).all()


def test_a_changed_picture_reencodes_itself_and_is_named(encoder: Encoder, tmp_path: Path) -> None:
    pictures = [picture(tmp_path, "a.png", 0), picture(tmp_path, "b.png", 255)]
    encoder.fill_pictures(pictures, encoder.latent_keys(pictures))
    pictures[1] = picture(tmp_path, "b.png", 102)
    again = replace(encoder, family=CountingFamily(), ledger=Ledger(tmp_path / "ledger.json"))
    report = again.fill_pictures(pictures, again.latent_keys(pictures))
    assert again.family.encoded == ["-0.20"]  # type: ignore[attr-defined]
    assert report.misses == {"changed: picture": 1} and report.hits == 1
    ledger = json.loads((tmp_path / "ledger.json").read_text())
    assert ledger["b.png at 64x64"]["picture"] == pictures[1].digest


# ---- the way from a folder to what the loop reads


def data_config(tmp_path: Path, **changes: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "pretrained_model_name_or_path": "unused",
            "output_dir": tmp_path / "out",
            "max_train_steps": 1,
            "mixed_precision": "no",
            "data_config": {"img_dir": tmp_path / "train", "img_size": 64, "caption_dropout_rate": 0.5},
            **changes,
        }
    )


def captioned(folder: Path, name: str, grey: int, caption: str) -> None:
    picture(folder, name, grey)
    (folder / name).with_suffix(".txt").write_text(caption)


ACCELERATOR: Any = SimpleNamespace(
    is_main_process=True, device=torch.device("cpu"), wait_for_everyone=lambda: None, num_processes=1
)


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_held_out_picture_of_the_same_name_is_not_trained_on(
    tmp_path: Path, model: ModelFolder, on_disk: bool
) -> None:
    captioned(tmp_path / "train", "001.png", 0, "black")
    captioned(tmp_path / "held_out", "001.png", 255, "white!")
    config = data_config(tmp_path, validation={"held_out_dir": tmp_path / "held_out"}, save_cache_on_disk=on_disk)
    data = prepare_data(config, CountingFamily(), model, ACCELERATOR)
    assert (data.reader.read_latents(0, 0).mean_BCHW == -1).all()
    assert (data.held_out[0].latents_1CHW == 1).all()
    assert data.reader.read_text(0)["prompt_embeds"][0, 0] == len("black")
    assert data.held_out[0].conditioning["prompt_embeds"][0, 0] == len("white!")
    assert data.reader.read_text(None)["prompt_embeds"][0, 0] == len(" "), "the dropped caption"
    assert (tmp_path / "train" / ".pixtune_cache").is_dir() == on_disk


def test_a_second_run_loads_no_encoder_and_is_the_same_data(tmp_path: Path, model: ModelFolder) -> None:
    for number in range(3):
        captioned(tmp_path / "train", f"{number}.png", 80 * number, f"picture {number}")
    config = data_config(tmp_path)
    first = prepare_data(config, CountingFamily(), model, ACCELERATOR)
    family = CountingFamily()
    second = prepare_data(config, family, model, ACCELERATOR)
    assert not family.loaded
    assert second.fingerprint == first.fingerprint and second.buckets == first.buckets == [[(64, 64)]] * 3
    (tmp_path / "train" / "1.txt").write_text("another")
    assert prepare_data(config, family, model, ACCELERATOR).fingerprint != first.fingerprint
    assert family.encoded == ["another"] and family.loaded == ["text encoder"]
