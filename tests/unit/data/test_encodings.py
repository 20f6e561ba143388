"""From files to encodings: what decides a key, what is encoded again, and what control pictures change."""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
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
from pixtune.data import encode, swapped
from pixtune.data.buckets import Framing, build_buckets, frame_picture
from pixtune.data.cache import ABSENT, DiskStore, Ledger
from pixtune.data.encode import Encoder, FramedPicture, TextItem
from pixtune.data.filling import FillReport
from pixtune.data.images import Decoded, decoded
from pixtune.data.prepare import prepare_data
from pixtune.data.prepared import PreparedData
from pixtune.errors import DataError
from pixtune.families.qwen_image import CaptionReader, QwenImage
from pixtune.family import LatentDistribution, Placement, Prompt, PromptOutline, TextLength
from pixtune.hardware.meminfo import HostMemory
from pixtune.launch.crew import Crew
from pixtune.plan.encoders import ON_CPU, PLAINLY
from pixtune.sizes import Size
from pixtune.storage.files import file_digest
from pixtune.storage.model_folder import ModelFolder
from tests.crews import in_crew

# ---- the keys of real captions and pictures, and what is encoded for them


class CountingFamily(QwenImage):
    """Counts; a caption's features are its length and its pictures' widths, a picture's mean its own mean."""

    def __init__(self, prompt_template: str = "template {}", max_controls: int = 0) -> None:
        super().__init__("qwen_image", (), CaptionReader(), max_controls)
        self.prompt_template = prompt_template
        self.loaded: list[str] = []
        self.encoded: list[str] = []
        self.max_tokens: list[int | None] = []
        self.counted: list[str] = []

    def control_size(self, folder: ModelFolder, picture: Size, side: int) -> Size:
        return (side // 16 * 16, 16 * round(side * picture[1] / picture[0] / 16))

    def vision_size(self, picture: Size, side: int) -> Size:
        return (32, 32)

    def load_text_encoder(self, folder: ModelFolder, placement: Placement) -> Any:
        self.loaded.append("text encoder")
        return None

    def load_autoencoder(self, folder: ModelFolder, placement: Placement) -> Any:
        self.loaded.append("autoencoder")
        return None

    def encode_text(
        self, encoder: Any, prompts: Sequence[Prompt], max_tokens: int | None = None
    ) -> list[dict[str, Tensor]]:
        self.encoded += [prompt.text for prompt in prompts]
        self.max_tokens.append(max_tokens)
        greys = [sum(picture.tobytes()[0] for picture in prompt.pictures) for prompt in prompts]
        return [
            {"prompt_embeds": torch.full((2 + len(prompt.pictures), 3), float(len(prompt.text) + 1000 * grey))}
            for prompt, grey in zip(prompts, greys, strict=True)
        ]

    def text_lengths(
        self, folder: ModelFolder, prompts: Sequence[PromptOutline], max_tokens: int | None = None
    ) -> list[tuple[TextLength, ...]]:
        """A token for each letter, and ten for each picture."""
        self.counted += [prompt.text for prompt in prompts]
        limit = max_tokens or 40
        return [
            (TextLength("it reads", len(prompt.text) + 10 * len(prompt.picture_sizes), limit),) for prompt in prompts
        ]

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
        plan=PLAINLY,
        max_text_tokens=None,
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
    return FramedPicture(name, path, file_digest(path), framing)


def other_weights(folder: ModelFolder, part: str) -> None:
    save_file({"weight": torch.ones(4)}, folder.path / part / "model.safetensors")


def other_config(folder: ModelFolder, part: str) -> None:
    (folder.path / part / "config.json").write_text('{"latents_mean": [1]}')


def text_digest(encoder: Encoder, text: str = "a fox") -> str:
    (made,) = encoder.text_keys([TextItem(text)])
    return made.digest


def fill_texts(encoder: Encoder, texts: Sequence[str]) -> FillReport:
    items = [TextItem(text) for text in texts]
    return encoder.fill_texts(items, encoder.text_keys(items))


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
    bf16 = replace(encoder, placement=Placement(torch.device("cpu"), torch.bfloat16))
    template = replace(encoder, family=CountingFamily(prompt_template="Template {}"))
    shorter = replace(encoder, max_text_tokens=7)
    changed = [text_digest(encoder, "a fox "), text_digest(bf16), text_digest(template), text_digest(shorter)]
    assert len({before, *changed}) == 5


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
    fill_texts(encoder, texts)
    family = encoder.family
    assert isinstance(family, CountingFamily)
    assert sorted(family.encoded) == sorted(texts) and family.loaded == ["text encoder"]
    family.encoded.clear()
    texts[1] = "an owl at night"
    report = fill_texts(encoder, texts)
    assert family.encoded == ["an owl at night"] and report.hits == 2
    assert encoder.store.read(text_digest(encoder, "an owl at night"))["prompt_embeds"][0, 0] == 15
    fill_texts(encoder, texts)
    assert family.loaded == ["text encoder"] * 2 and len(family.encoded) == 1


def test_pictures_are_stored_as_mean_and_deviation_each_under_its_own_key(encoder: Encoder, tmp_path: Path) -> None:
    """Stored latents that were drawn would make every epoch's latents the same."""
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


def test_pictures_are_decoded_a_few_ahead_and_encoded_one_by_one_size_by_size(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding all that are missing at once would fill the memory wherever the encoder is the slower one."""
    sizes = [FRAMING, frame_picture(64, 32, build_buckets(64, 16))]
    pictures = [picture(tmp_path, f"{number}.png", number, sizes[number % 2]) for number in range(40)]
    decoded: list[str] = []
    ahead: list[int] = []
    shapes: list[torch.Size] = []
    read = FramedPicture.read

    def counted(self: FramedPicture) -> Image.Image:
        decoded.append(self.name)
        return read(self)

    class Slow(CountingFamily):
        def encode_images(self, autoencoder: Any, pixels_B3HW: Tensor) -> LatentDistribution:
            time.sleep(0.005)
            ahead.append(len(decoded) - len(shapes))
            shapes.append(pixels_B3HW.shape)
            return super().encode_images(autoencoder, pixels_B3HW)

    monkeypatch.setattr(FramedPicture, "read", counted)
    slow = replace(encoder, family=Slow())
    slow.fill_pictures(pictures, slow.latent_keys(pictures))
    assert len(shapes) == 40 and shapes == sorted(shapes, reverse=True) and {shape[0] for shape in shapes} == {1}
    assert 1 < max(ahead) <= 2 * encode.DECODE_THREADS + 1


def test_a_changed_picture_reencodes_itself_and_is_named(encoder: Encoder, tmp_path: Path) -> None:
    pictures = [picture(tmp_path, "a.png", 0), picture(tmp_path, "b.png", 255)]
    encoder.fill_pictures(pictures, encoder.latent_keys(pictures))
    pictures[1] = picture(tmp_path, "b.png", 102)
    family = CountingFamily()
    again = replace(encoder, family=family, ledger=Ledger(tmp_path / "ledger.json"))
    report = again.fill_pictures(pictures, again.latent_keys(pictures))
    assert family.encoded == ["-0.20"]
    assert report.misses == {"with another picture": 1} and report.hits == 1
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
    assert data.reader.read_text(0, 0, 0)["prompt_embeds"][0, 0] == len("black")
    assert data.held_out[0].conditioning["prompt_embeds"][0, 0] == len("white!")
    assert data.reader.read_text(0, 0, None)["prompt_embeds"][0, 0] == len(" "), "the dropped caption"
    assert (tmp_path / "train" / ".pixtune_cache").is_dir() == on_disk


def test_a_second_run_loads_no_encoder_and_is_the_same_data(tmp_path: Path, model: ModelFolder) -> None:
    for number in range(3):
        captioned(tmp_path / "train", f"{number}.png", 80 * number, f"picture {number}")
    config = data_config(tmp_path)
    first = prepare_data(config, CountingFamily(), model, ACCELERATOR)
    family = CountingFamily()
    second = prepare_data(config, family, model, ACCELERATOR)
    assert not family.loaded
    assert second.fingerprint == first.fingerprint and second.buckets == first.buckets == [[((64, 64),)]] * 3
    (tmp_path / "train" / "1.txt").write_text("another")
    assert prepare_data(config, family, model, ACCELERATOR).fingerprint != first.fingerprint
    assert family.encoded == ["another"] and family.loaded == ["text encoder"]


@pytest.mark.parametrize("stays", [True, False])
def test_encoders_stay_loaded_or_make_room(tmp_path: Path, model: ModelFolder, stays: bool) -> None:
    """Pattern 1 of the contract: what has encoded leaves the device, unless the config or the machine says it stays."""
    captioned(tmp_path / "train", "a.png", 80, "a picture")
    loaded: list[weakref.ref[torch.nn.Module]] = []

    class Remembering(CountingFamily):
        def load_text_encoder(self, folder: ModelFolder, placement: Placement) -> Any:
            return self.remember()

        def load_autoencoder(self, folder: ModelFolder, placement: Placement) -> Any:
            return self.remember()

        def remember(self) -> torch.nn.Module:
            encoder = torch.nn.Module()
            loaded.append(weakref.ref(encoder))
            return encoder

    data = prepare_data(data_config(tmp_path, disable_cpu_offload=stays), Remembering(), model, ACCELERATOR)
    assert [encoder() is not None for encoder in loaded] == [stays, stays]
    del data


class OneTokenALetter(CountingFamily):
    def encode_text(self, encoder: Any, prompts: Sequence[Prompt], max_tokens: int | None = None) -> Any:
        return [{"prompt_embeds": torch.zeros(len(prompt.text), 3)} for prompt in prompts]


@pytest.mark.parametrize(
    ("captions", "dropout", "precomputed", "differ", "longest"),
    [
        (("five!", "fives"), 0.0, True, False, 5),
        (("five!", "fives"), 0.1, True, True, 5),  # the dropped caption is one space
        (("five!", "sixsix"), 0.0, True, True, 6),
        (("a", "b"), 0.1, True, False, 1),
        (("five!", "fives"), 0.0, False, True, 5),  # as far as is known
    ],
)
def test_whether_captions_come_in_several_lengths(
    tmp_path: Path, model: ModelFolder, captions: tuple[str, str], dropout: float, precomputed: bool, differ: bool,
    longest: int,
) -> None:  # fmt: skip
    for number, caption in enumerate(captions):
        captioned(tmp_path / "train", f"{number}.png", 80 * number, caption)
    settings = {"img_dir": tmp_path / "train", "img_size": 64, "caption_dropout_rate": dropout}
    config = data_config(tmp_path, data_config=settings, precompute_text_embeddings=precomputed)
    data = prepare_data(config, OneTokenALetter(), model, ACCELERATOR)
    assert (data.captions.differ, data.most_text_tokens) == (differ, longest)
    assert bool(data.captions.sizes) == precomputed
    assert data.micro_batch_tokens(2) == 2 * (data.most_image_tokens + longest)
    assert data.micro_batch_tokens(2, text_multiple=64) == 2 * (data.most_image_tokens + 64)


def test_which_captions_meet_which_picture_sizes(tmp_path: Path, model: ModelFolder) -> None:
    """Each picture once an epoch, its variants and the dropped caption by their shares."""
    for number, (caption, size) in enumerate([("five!", (64, 64)), ("fives", (64, 64)), ("three", (64, 32))]):
        captioned(tmp_path / "train", f"{number}.png", 80 * number, caption)
        Image.new("RGB", size).save(tmp_path / "train" / f"{number}.png")
    captioned(tmp_path / "train", "3.png", 10, "sixsix")
    settings = {"img_dir": tmp_path / "train", "img_size": 64, "caption_dropout_rate": 0.25}
    config = data_config(tmp_path, data_config=settings)
    sizes = prepare_data(config, OneTokenALetter(), model, ACCELERATOR).captions.sizes
    wide, square = sorted((dict(size.turns_by_length) for size in sizes), key=len)
    assert square == {5: 1.5, 6: 0.75, 1: 0.75} and wide == {5: 0.75, 1: 0.25}
    settings = {**settings, "random_ratio": True}
    varied = prepare_data(data_config(tmp_path, data_config=settings), OneTokenALetter(), model, ACCELERATOR).captions
    draws = [sum(size.turns_by_length.values()) for size in varied.sizes]
    assert len(draws) > 2 and sum(draws) == pytest.approx(4)


def test_captions_meet_sizes_by_repeats_shares_and_forms(tmp_path: Path, model: ModelFolder) -> None:
    captioned(tmp_path / "one", "a.png", 80, "ab\nabcd")
    captioned(tmp_path / "two", "b.png", 90, "sixsix")
    folders = [
        {"img_dir": str(tmp_path / "one"), "repeats": 3, "caption_source": "lines", "caption_dropout_rate": 0.4},
        {
            "img_dir": str(tmp_path / "two"),
            "repeats": 0.5,
            "img_size": [64, 32],
            "img_size_shares": [3, 1],
            "flip": True,
        },
    ]
    settings = {"folders": folders, "img_size": 64, "caption_dropout_rate": 0.2}
    data = prepare_data(data_config(tmp_path, data_config=settings), OneTokenALetter(), model, ACCELERATOR)
    large, small = (dict(size.turns_by_length) for size in data.captions.sizes)
    assert large == pytest.approx({2: 0.9, 4: 0.9, 6: 0.5 * 0.75 * 0.8, 1: 1.2 + 0.5 * 0.75 * 0.2})
    assert small == pytest.approx({6: 0.5 * 0.25 * 0.8, 1: 0.5 * 0.25 * 0.2})
    assert [use.repeats for use in data.uses] == [3.0, 0.5]
    assert [len(data.reader.read_text(0, 0, number)["prompt_embeds"]) for number in (0, 1, None)] == [2, 4, 1]
    plain, mirrored = (data.reader.read_latents(1, variant).mean_BCHW for variant in (0, 2))
    assert plain.shape == mirrored.shape and data.buckets[1][0] == data.buckets[1][2] != data.buckets[1][1]


# ---- control pictures


def edit_set(tmp_path: Path, **changes: Any) -> TrainConfig:
    """Two rows with a control each, the second's of another shape than its target."""
    captioned(tmp_path / "train", "a.png", 100, "brighter")
    captioned(tmp_path / "train", "b.png", 200, "much brighter")
    picture(tmp_path / "control", "a.png", 10)
    path = tmp_path / "control" / "b.png"
    Image.new("RGB", (64, 32), (20, 20, 20)).save(path)
    data = {
        "img_dir": tmp_path / "train",
        "control_dir": tmp_path / "control",
        "img_size": 64,
        "control_size": 48,
        "caption_dropout_rate": 0.5,
        **changes.pop("data_config", {}),
    }
    return data_config(tmp_path, data_config=data, **changes)


def test_controls_reach_latents_text_and_buckets(tmp_path: Path, model: ModelFolder) -> None:
    family = CountingFamily(max_controls=1)
    data = prepare_data(edit_set(tmp_path), family, model, ACCELERATOR)
    assert data.buckets == [[((64, 64), (48, 48))], [((64, 64), (48, 32))]]
    (first,), (second,) = data.reader.read_controls(0, 0), data.reader.read_controls(1, 0)
    assert first.shape == (1, 2, 6, 6) and second.shape == (1, 2, 4, 6)
    torch.testing.assert_close(first.mean(), torch.tensor(10 / 127.5 - 1))
    assert data.reader.read_text(0, 0, 0)["prompt_embeds"][0, 0] == len("brighter") + 10_000
    assert data.reader.read_text(1, 0, None)["prompt_embeds"][0, 0] == 1 + 20_000, "dropped caption, own control"
    assert data.most_image_tokens == 16 + 9


def test_another_control_reencodes_what_it_decides_alone(tmp_path: Path, model: ModelFolder) -> None:
    family = CountingFamily(max_controls=1)
    config = edit_set(tmp_path)
    before = prepare_data(config, family, model, ACCELERATOR).fingerprint
    family.encoded.clear()
    picture(tmp_path / "control", "a.png", 30)
    assert prepare_data(config, family, model, ACCELERATOR).fingerprint != before
    assert sorted(family.encoded) == [" ", f"{30 / 127.5 - 1:.2f}", "brighter"]


@pytest.mark.parametrize("rows_without", [0, 1])
def test_missing_controls_are_named_unless_the_config_allows_them(
    tmp_path: Path, model: ModelFolder, rows_without: int
) -> None:
    config = edit_set(tmp_path)
    if rows_without:
        (tmp_path / "control" / "b.png").unlink()
        with pytest.raises(DataError, match=r"b\.png has no control picture"):
            prepare_data(config, CountingFamily(max_controls=1), model, ACCELERATOR)
    config = edit_set(tmp_path, data_config={"allow_missing_controls": True})
    if rows_without:
        (tmp_path / "control" / "b.png").unlink()
    data = prepare_data(config, CountingFamily(max_controls=1), model, ACCELERATOR)
    assert len(data.reader.read_controls(1, 0)) == 1 - rows_without


def test_a_text_model_refuses_controls_and_an_edit_model_wants_them(tmp_path: Path, model: ModelFolder) -> None:
    with pytest.raises(DataError, match="takes no control pictures"):
        prepare_data(edit_set(tmp_path), CountingFamily(max_controls=0), model, ACCELERATOR)
    with pytest.raises(DataError, match=r"these have none: a\.png, b\.png"):
        config = edit_set(tmp_path, data_config={"control_dir": None})
        prepare_data(config, CountingFamily(max_controls=1), model, ACCELERATOR)


def test_more_controls_than_the_model_takes_are_named(tmp_path: Path, model: ModelFolder) -> None:
    config = edit_set(tmp_path, data_config={"control_dir": [tmp_path / "control", tmp_path / "control"]})
    with pytest.raises(DataError, match=r"at most 1 control pictures; these have more: a\.png \(2\), b\.png \(2\)"):
        prepare_data(config, CountingFamily(max_controls=1), model, ACCELERATOR)
    data = prepare_data(config, CountingFamily(max_controls=2), model, ACCELERATOR)
    assert len(data.reader.read_controls(0, 0)) == 2


def test_a_metadata_file_gives_each_row_its_own_controls(tmp_path: Path, model: ModelFolder) -> None:
    edit_set(tmp_path)
    rows = [
        {"image": "a.png", "caption": "one", "control": "../control/a.png"},
        {"image": "a.png", "caption": "two", "control": ["../control/a.png", "../control/b.png"]},
        {"image": "b.png", "caption": "none", "control": []},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = edit_set(
        tmp_path,
        data_config={
            "control_dir": None, "metadata_file": tmp_path / "rows.jsonl", "allow_missing_controls": True,
        },
    )  # fmt: skip
    data = prepare_data(config, CountingFamily(max_controls=3), model, ACCELERATOR)
    assert list(data.reader.names) == ["a.png", "a.png#2", "b.png"]
    assert [len(data.reader.read_controls(row, 0)) for row in range(3)] == [1, 2, 0]
    assert data.reader.read_text(1, 0, 0)["prompt_embeds"][0, 0] == len("two") + 30_000


def test_prompts_of_samples_bring_their_controls(tmp_path: Path, model: ModelFolder) -> None:
    controls = [[tmp_path / "control" / "b.png"], [tmp_path / "control" / "a.png"]]
    config = edit_set(tmp_path, samples={"prompts": ["x", "yy"], "controls": controls, "guidance_scale": 2.0})
    wide, square = prepare_data(config, CountingFamily(max_controls=1), model, ACCELERATOR).prompts
    assert wide.size[0] > wide.size[1] and square.size == (64, 64), "drawn in the control's shape"
    assert wide.controls[0].shape == (1, 2, 4, 6)
    assert wide.positive["prompt_embeds"][0, 0] == 1 + 20_000
    assert wide.negative is not None and wide.negative["prompt_embeds"][0, 0] == 1 + 20_000
    assert square.positive["prompt_embeds"][0, 0] == 2 + 10_000


# ---- pairs that are encoded both ways, to ask the base model whether they are swapped


def four_pairs(tmp_path: Path) -> TrainConfig:
    """Targets of grey 100 to 103, controls of grey 10 to 13."""
    for number in range(4):
        captioned(tmp_path / "train", f"{number}.png", 100 + number, "brighter")
        picture(tmp_path / "control", f"{number}.png", 10 + number)
    data = {"img_dir": tmp_path / "train", "control_dir": tmp_path / "control", "img_size": 64, "control_size": 48}
    return data_config(tmp_path, data_config=data)


def test_each_way_has_its_own_target_control_and_text(tmp_path: Path, model: ModelFolder) -> None:
    family = CountingFamily(max_controls=1)
    pairs = prepare_data(four_pairs(tmp_path), family, model, ACCELERATOR).both_ways
    assert len(pairs) == 4
    for pair in pairs:
        name = pair.as_given.captioned.name
        assert pair.swapped.captioned.name == name, "the name decides the noise"
        for way, target, control in ((pair.as_given, 100, 10), (pair.swapped, 10, 100)):
            target, control = target + int(name[0]), control + int(name[0])
            for picture_of_way, num_letters in ((way.captioned, len("brighter")), (way.uncaptioned, len(" "))):
                latents, (seen,) = picture_of_way.latents_1CHW, picture_of_way.controls
                torch.testing.assert_close(latents, torch.full((1, 2, 8, 8), target / 127.5 - 1))
                torch.testing.assert_close(seen, torch.full((1, 2, 6, 6), control / 127.5 - 1))
                assert picture_of_way.conditioning["prompt_embeds"][0, 0] == num_letters + 1000 * control


def test_they_come_from_the_cache_and_decide_nothing(
    tmp_path: Path, model: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = four_pairs(tmp_path)
    first = prepare_data(config, CountingFamily(max_controls=1), model, ACCELERATOR)
    family = CountingFamily(max_controls=1)
    assert prepare_data(config, family, model, ACCELERATOR).both_ways and not family.loaded
    monkeypatch.setattr(swapped, "FEWEST_PAIRS", 5)
    without = prepare_data(config, family, model, ACCELERATOR)
    assert not without.both_ways
    assert without.fingerprint == first.fingerprint and without.buckets == first.buckets


# ---- encoding in the loop


@pytest.mark.parametrize("key", ["precompute_text_embeddings", "precompute_image_embeddings"])
def test_encoding_in_the_loop_gives_what_the_cache_gives(tmp_path: Path, model: ModelFolder, key: str) -> None:
    cached = prepare_data(edit_set(tmp_path), CountingFamily(max_controls=1), model, ACCELERATOR)
    family = CountingFamily(max_controls=1)
    config = edit_set(tmp_path, **{key: False}, save_cache_on_disk=False)
    live = prepare_data(config, family, model, ACCELERATOR)
    encoded_before = len(family.encoded)
    for example in range(2):
        for caption in (0, None):
            one, other = (data.reader.read_text(example, 0, caption) for data in (cached, live))
            assert torch.equal(one["prompt_embeds"], other["prompt_embeds"])
        stored, made = (data.reader.read_latents(example, 0) for data in (cached, live))
        torch.testing.assert_close(stored.mean_BCHW, made.mean_BCHW)
        torch.testing.assert_close(stored.std_BCHW, made.std_BCHW)
        torch.testing.assert_close(cached.reader.read_controls(example, 0), live.reader.read_controls(example, 0))
    assert len(family.encoded) > encoded_before, "nothing was encoded in the loop"
    assert live.fingerprint == cached.fingerprint, "a run may go on either way"


def test_the_captions_cut_reaches_the_family(tmp_path: Path, model: ModelFolder) -> None:
    captioned(tmp_path / "train", "a.png", 0, "black")
    family = CountingFamily()
    config = data_config(tmp_path, data_config={"img_dir": tmp_path / "train", "img_size": 64, "max_text_tokens": 9})
    prepare_data(config, family, model, ACCELERATOR)
    assert set(family.max_tokens) == {9}


# ---- pictures that change during a run


def edit(path: Path) -> None:
    Image.new("RGB", (64, 64), (250, 250, 250)).save(path)


def readings(data: PreparedData) -> list[Tensor]:
    """All that a step reads of the first example."""
    latents, reader = data.reader.read_latents(0, 0), data.reader
    texts = [reader.read_text(0, 0, caption)["prompt_embeds"] for caption in (0, None)]
    return [latents.mean_BCHW, latents.std_BCHW, *texts, *reader.read_controls(0, 0)]


@pytest.mark.parametrize("change", [edit, Path.unlink])
def test_what_is_in_the_cache_is_trained_on_whatever_becomes_of_the_files(
    tmp_path: Path, model: ModelFolder, change: Callable[[Path], None]
) -> None:
    data = prepare_data(edit_set(tmp_path), CountingFamily(max_controls=1), model, ACCELERATOR)
    before = readings(data)
    change(tmp_path / "train" / "a.png")
    change(tmp_path / "control" / "a.png")
    assert all(torch.equal(one, other) for one, other in zip(before, readings(data), strict=True))


@pytest.mark.parametrize(
    ("key", "changed", "read"),
    [
        ("precompute_image_embeddings", "train/a.png", lambda reader: reader.read_latents(0, 0)),
        ("precompute_image_embeddings", "control/a.png", lambda reader: reader.read_controls(0, 0)),
        ("precompute_text_embeddings", "control/a.png", lambda reader: reader.read_text(0, 0, None)),
    ],
)
def test_a_picture_that_changed_is_named_where_it_is_encoded_in_the_loop(
    tmp_path: Path, model: ModelFolder, key: str, changed: str, read: Callable[[Any], Any]
) -> None:
    data = prepare_data(edit_set(tmp_path, **{key: False}), CountingFamily(max_controls=1), model, ACCELERATOR)
    path = tmp_path / changed
    original = path.read_bytes()
    read(data.reader)
    edit(path)
    with pytest.raises(DataError, match=rf"{path} has other content than when it was first read \(.*\d\d:\d\d"):
        read(data.reader)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path} was moved or deleted .*Put it back as it was and resume"):
        read(data.reader)
    path.write_bytes(original)
    read(data.reader)


def test_a_picture_that_changes_before_it_is_encoded_is_not_stored_under_the_old_content(
    encoder: Encoder, tmp_path: Path
) -> None:
    framed = picture(tmp_path, "a.png", 10)
    keys = encoder.latent_keys([framed])
    edit(framed.path)
    with pytest.raises(DataError, match="other content"):
        encoder.fill_pictures([framed], keys)
    assert encoder.store.problem(keys[0].digest) == ABSENT


def shrink(path: Path) -> None:
    """Leaves a picture in which the framed part of the earlier one does not lie."""
    Image.new("RGB", (8, 8)).save(path)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize("replace_it", [edit, shrink, cut_off])
def test_a_picture_that_is_replaced_while_it_is_read_is_not_stored_under_the_old_content(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replace_it: Callable[[Path], None]
) -> None:
    framed = picture(tmp_path, "a.png", 10)
    keys = encoder.latent_keys([framed])

    def replaced_before_it_is_opened(path: Path) -> AbstractContextManager[Decoded]:
        replace_it(path)
        return decoded(path)

    monkeypatch.setattr(encode, "decoded", replaced_before_it_is_opened)
    with pytest.raises(DataError, match="other content"):
        encoder.fill_pictures([framed], keys)
    assert encoder.store.problem(keys[0].digest) == ABSENT


def test_damaged_entries_are_named_in_one_line_as_they_are_called(
    tmp_path: Path, model: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names may look like the marks with which a terminal's text is made bold."""
    for number in range(7):
        captioned(tmp_path / "train", f"{number}[/b].png", number, "the same")
    prepare_data(data_config(tmp_path), CountingFamily(), model, ACCELERATOR)
    for file in (tmp_path / "train").rglob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    capsys.readouterr()
    prepare_data(data_config(tmp_path), CountingFamily(), model, ACCELERATOR)
    captions, pictures = capsys.readouterr().out.splitlines()
    assert captions == "captions: 0 from the cache, 2 encoded (2 damaged: caption 'the same', caption ' ')"
    names = ", ".join(f"{number}[/b].png at 64x64" for number in range(5))
    assert pictures == f"pictures: 0 from the cache, 7 encoded (7 damaged: {names} and 2 more)"


# ---- captions that are cut


def test_captions_that_are_cut_are_named_once_and_counted_once(
    tmp_path: Path, model: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    captioned(tmp_path / "train", "a.png", 0, "short")
    captioned(tmp_path / "train", "b.png", 100, "twelve words")
    captioned(tmp_path / "held_out", "c.png", 200, "thirteen signs")
    changes: dict[str, Any] = {
        "data_config": {"img_dir": tmp_path / "train", "img_size": 64, "max_text_tokens": 9},
        "validation": {"held_out_dir": tmp_path / "held_out"},
        "samples": {"prompts": ["a prompt too long"]},
    }
    sentence = (
        "note: 3 captions are longer than the 9 tokens that it reads, and are cut there: b.png (12 tokens), c.png (14 "
        "tokens), the prompt 'a prompt too long' (17 tokens).\n"
    )
    prepare_data(data_config(tmp_path, **changes), CountingFamily(), model, ACCELERATOR)
    assert capsys.readouterr().out.count(sentence) == 1
    family = CountingFamily()
    prepare_data(data_config(tmp_path, **changes), family, model, ACCELERATOR)
    assert capsys.readouterr().out.count(sentence) == 1 and not family.counted, "a warm cache counts nothing"
    changes["data_config"]["max_text_tokens"] = 17
    prepare_data(data_config(tmp_path, **changes), family, model, ACCELERATOR)
    assert "longer than" not in capsys.readouterr().out and len(family.counted) == 4


def test_captions_in_the_loop_and_beside_pictures_are_counted_before_training(
    tmp_path: Path, model: ModelFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"precompute_text_embeddings": False, "data_config": {"max_text_tokens": 20, "random_ratio": True}}
    prepare_data(edit_set(tmp_path, **changes), CountingFamily(max_controls=1), model, ACCELERATOR)
    assert "1 caption is longer than the 20 tokens that it reads, and is cut there: b.png (23 tokens)." in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize(
    ("text_format", "local_rank", "available", "takes_part"),
    [
        (None, 5, 0, True),  # it goes to the GPU as it is read
        ("int8", 0, 0, True),
        ("int8", 1, 32, True),
        ("int8", 2, 32, False),  # the third one of 16 bytes
        (ON_CPU, 0, 0, True),
        (ON_CPU, 1, 1 << 40, False),
    ],
)
def test_as_many_processes_hold_a_text_encoder_as_the_host_has_room_for(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, text_format: str | None, local_rank: int, available: int,
    takes_part: bool,
) -> None:  # fmt: skip
    """The text encoder has 4 weights of 4 bytes; its tokenizer has none."""
    (encoder.folder.path / "tokenizer" / "model.safetensors").unlink()
    monkeypatch.setattr(encode, "read_host_memory", lambda: HostMemory(1 << 50, available, available, 0))
    crew = in_crew(2, lambda each: each)[0]
    crew.local_rank = local_rank
    one = replace(encoder, plan=replace(PLAINLY, text_format=text_format), crew=crew)
    assert one._may_encode_texts() == takes_part


def test_processes_divide_what_is_missing_and_load_nothing_where_others_take_all(
    encoder: Encoder, tmp_path: Path
) -> None:
    def work(crew: Crew) -> tuple[list[str], list[str], str]:
        one = replace(encoder, family=CountingFamily(), store=DiskStore(tmp_path / "entries"), crew=crew)
        reports = [fill_texts(one, [f"{number}"]) for number in range(2)]
        reports.append(fill_texts(one, [f"{number:02}" for number in range(40)]))
        return one.family.encoded, one.family.loaded, "; ".join(map(str, reports))  # type: ignore[attr-defined]

    found = in_crew(3, work)
    assert sorted(text for encoded, _, _ in found for text in encoded) == sorted(
        ["0", "1", *(f"{number:02}" for number in range(40))]
    )
    assert sum(len(loaded) for _, loaded, _ in found) <= 5, "one for each of the first two, and three"
    reports = [f"0 from the cache, {number} encoded ({number} new)" for number in (1, 1, 40)]
    assert {report for _, _, report in found} == {"; ".join(reports)}
    assert len([*tmp_path.rglob("*.safetensors")]) == 42 + 3
