"""The captioner beside transformers' own processors, chat templates and greedy `generate`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

from pixtune.engine.weight_only import quantize_encoder
from pixtune.errors import WeightsError
from pixtune.families.captioners import open_captioner
from pixtune.family import Placement, Question, TextEncoder
from tests.captioners import KINDS, TINY, write_captioner
from tests.runs import ROOT

CPU = Placement(torch.device("cpu"), torch.float32)
SIZES = ((200, 120), (90, 300), (64, 64))

TEMPLATES = {
    # The published format, in jinja: Qwen2.5-VL begins with a system message of its own, Qwen3-VL with none.
    "qwen2_5_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
    "qwen3_vl": "",
}
CONVERSATION = (
    "{% set pictures = namespace(count=0) %}{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}{% set pictures.count = pictures.count + 1 %}"
    "{% if add_vision_id %}Picture {{ pictures.count }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_captioner(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def picture(size: tuple[int, int], turn: int = 0) -> Image.Image:
    gradient = Image.linear_gradient("L").rotate(90 * turn).resize(size)
    return Image.merge("RGB", [gradient, gradient.rotate(180), Image.new("L", size, 90 * turn % 256)])


def questions() -> list[Question]:
    return [Question("What is this?", (picture(size, turn),)) for turn, size in enumerate(SIZES)]


def stock_processor(folder: Path, kind: str) -> Any:
    """The picture processor with the published values, which the folder lacks."""
    if kind == "qwen2_5_vl":
        return Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280})
    half = [0.5, 0.5, 0.5]
    size = {"shortest_edge": 4 * 32 * 32, "longest_edge": 32 * 32 * 1280}
    return Qwen2VLImageProcessorPil(size=size, patch_size=16, image_mean=half, image_std=half)


def stock_inputs(folder: Path, kind: str, question: Question) -> dict[str, torch.Tensor]:
    """The model's inputs by the chat template and the placeholders of transformers' processors."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    content = [*({"type": "image"} for _ in question.pictures), {"type": "text", "text": question.text}]
    text = TEMPLATES[kind] + tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=CONVERSATION, tokenize=False, add_generation_prompt=True,
        add_vision_id=len(question.pictures) > 1,
    )  # fmt: skip
    seen = dict(stock_processor(folder, kind)(images=list(question.pictures), return_tensors="pt"))
    for grid in seen["image_grid_thw"].tolist():
        text = text.replace("<|image_pad|>", "<|held|>" * (math.prod(grid) // 4), 1)
    tokens = dict(tokenizer([text.replace("<|held|>", "<|image_pad|>")], return_tensors="pt"))
    is_picture = (tokens["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    return {**tokens, **seen, "mm_token_type_ids": is_picture}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_pictures", [1, 2])
def test_inputs_are_those_of_the_chat_template(folders: dict[str, Path], kind: str, num_pictures: int) -> None:
    captioner = open_captioner(folders[kind])
    pictures = tuple(picture(size) for size in SIZES[:num_pictures])
    question = Question("What changes, and where?", pictures)
    expected = stock_inputs(folders[kind], kind, question)
    (_,), (vision,) = (encoder := captioner.load(CPU)).models, encoder.tokenizers
    text = captioner.question(question.text, num_pictures)  # type: ignore[attr-defined]
    ours = vision([text], [pictures])
    assert set(ours) == set(expected)
    fitted = vision([text], [[captioner.fit(each) for each in pictures]])
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor) and torch.equal(fitted[name], tensor), name
    assert captioner.count_tokens(question.text, [each.size for each in pictures]) == expected["input_ids"].shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_stock_greedy_generation_one_by_one(folders: dict[str, Path], kind: str) -> None:
    captioner = open_captioner(folders[kind])
    encoder = captioner.load(CPU)
    answers = captioner.answer(encoder, questions(), 24)
    model = getattr(transformers, json.loads((folders[kind] / "config.json").read_text())["architectures"][0])
    stock = model.from_pretrained(folders[kind], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders[kind])
    expected = []
    for question in questions():
        inputs = stock_inputs(folders[kind], kind, question)
        plain = {"do_sample": False, "temperature": None, "top_k": None, "repetition_penalty": 1.0}
        whole = stock.generate(**inputs, max_new_tokens=24, pad_token_id=tokenizer.pad_token_id, **plain)
        expected.append(tokenizer.decode(whole[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert [answer.text for answer in answers] == expected
    assert len(set(expected)) == len(SIZES), "the words must depend on the picture"
    assert captioner.answer(encoder, questions()[1:2], 24) == answers[1:2]


def test_an_answer_ends_at_the_end_mark(folders: dict[str, Path]) -> None:
    captioner = open_captioner(folders["qwen2_5_vl"])
    encoder = captioner.load(CPU)
    end = encoder.tokenizers[0].tokenizer.convert_tokens_to_ids("<|im_end|>")

    def end_third(logits_BV: torch.Tensor, position: int) -> torch.Tensor:
        logits_BV[:, end] = math.inf if position == 3 else -math.inf
        return logits_BV

    (longer,) = captioner.answer(encoder, questions()[:1], 3)
    (ended,) = captioner.answer(encoder, questions()[:1], 24, end_third)
    assert (ended.text, ended.ended, longer.ended) == (longer.text, True, False)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_counted_by_what_is_loaded(tmp_path: Path, folders: dict[str, Path], kind: str) -> None:
    for folder in (folders[kind], write_captioner(tmp_path / "tied", kind, tied=True), TINY):
        captioner = open_captioner(folder)
        model: Any = captioner.load(CPU).models[0]
        weights = captioner.weights
        held = {name: parameter.numel() for name, parameter in model.named_parameters()}
        assert weights.linear + weights.output + weights.plain == sum(held.values())
        assert weights.output == held.get("lm_head.weight", 0)
        names = [name for name in held if "language_model.layers" in name and name.endswith("_proj.weight")]
        assert weights.linear == sum(held[name] for name in names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("linear_format", ["int8", "nf4"])
def test_quantized_it_keeps_its_eyes_and_most_of_its_words(
    folders: dict[str, Path], kind: str, linear_format: str
) -> None:
    captioner = open_captioner(folders[kind])
    encoder, exact = captioner.load(CPU), captioner.load(CPU)
    model: Any = quantize_encoder(encoder.models[0], linear_format, CPU.device, captioner.formats)
    formats = {name: each.linear_format for name, each in model.named_modules() if hasattr(each, "linear_format")}
    assert not [name for name in formats if "visual" in name] and formats.pop("lm_head") == "int8"
    assert len(formats) == 2 * 7 and set(formats.values()) == {linear_format}
    seen: dict[str, torch.Tensor] = {}
    for name, each in (("quantized", encoder), ("exact", exact)):

        def keep(logits_BV: torch.Tensor, position: int, name: str = name) -> torch.Tensor:
            return seen.setdefault(name, logits_BV.clone())

        captioner.answer(TextEncoder(each.models, each.tokenizers), questions(), 1, keep)
    error = (seen["quantized"] - seen["exact"]).norm() / seen["exact"].norm()
    assert error < (0.05 if linear_format == "int8" else 0.4), error


def test_the_own_text_encoder_of_each_small_model_can_answer() -> None:
    for name in ("tiny-qwen-image", "tiny-qwen-image-edit"):
        captioner = open_captioner(ROOT / "assets" / name)
        (answer,) = captioner.answer(captioner.load(CPU), questions()[:1], 4)
        assert not answer.ended


def test_the_number_of_tokens_is_bounded_whatever_the_shape() -> None:
    captioner = open_captioner(TINY)
    bare = captioner.count_tokens("?", [])
    for size in ((20_000, 20_000), (20_000, 101), (101, 20_000), (1, 1), (13, 199)):
        assert 4 <= captioner.count_tokens("?", [size]) - bare - 2 <= 1280, size  # with marks around the picture
    fewer = open_captioner(TINY, picture_tokens=64)
    assert fewer.count_tokens("?", [(1000, 800)]) - bare - 2 <= 64 and min(fewer.fit(picture((900, 800))).size) < 230
    with pytest.raises(ValueError, match="longer than 200 times"):
        captioner.count_tokens("?", [(201, 1)])


# ---- folders that cannot write captions


def without(folder: Path, target: Path, beginning: str) -> Path:
    """A copy of a captioner whose file lacks some tensors."""
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(beginning)}
    assert len(kept) < len(tensors)
    save_file(kept, target / "model.safetensors")
    return target


def test_what_is_missing_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["qwen2_5_vl"]
    tower = next(name for name in load_file(folder / "model.safetensors") if "visual." in name).split("visual.")[0]
    with pytest.raises(WeightsError, match=r"lacks the vision tower, by which it sees.*saved for encoding text alone"):
        open_captioner(without(folder, tmp_path / "blind", f"{tower}visual."))
    with pytest.raises(WeightsError, match="lacks the output layer, by which it writes"):
        open_captioner(without(folder, tmp_path / "mute", "lm_head."))
    one = next(name for name in load_file(folder / "model.safetensors") if "layers.1.mlp" in name)
    with pytest.raises(WeightsError, match="lacks 1 tensors"):
        open_captioner(without(folder, tmp_path / "hole", one)).load(CPU)


def test_other_folders_are_refused_with_what_can(tmp_path: Path) -> None:
    can = "any local folder of Qwen2.5-VL or Qwen3-VL"
    with pytest.raises(WeightsError, match=f"Flux.*see no pictures.*qwen_image.*{can}"):
        open_captioner(ROOT / "assets" / "tiny-flux")
    with pytest.raises(WeightsError, match=f"there is no folder.*Nothing is downloaded.*{can}"):
        open_captioner(tmp_path / "absent")
    with pytest.raises(WeightsError, match="is no model"):
        open_captioner(tmp_path)
    for values, message in (
        ({"model_type": "llama"}, "holds a llama, which cannot write captions"),
        ({"model_type": "qwen2_5_vl", "quantization_config": {"bits": 4}}, "quantized form that is not read"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(WeightsError, match=message):
            open_captioner(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for file in folders["qwen2_5_vl"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "image_token_id": 7}))
    with pytest.raises(WeightsError, match="is no tokenizer of the model"):
        open_captioner(folder).count_tokens("?", [(64, 64)])
