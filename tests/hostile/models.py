"""Hostile model folders: the small model with one thing wrong, as a training run, a plan or a sample meets it."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.hostile.case import (
    EITHER,
    REFUSED,
    TAKEN,
    Attack,
    Case,
    nested,
    place,
    put,
    put_sparse,
    replace_by,
    safetensors,
)
from tests.hostile.texts import ESCAPE, lay_caption, lay_pictures, train
from tests.hostile.weights import Executed, zip_of_a_pickle
from tests.runs import ROOT, TINY_MODEL

MODELS = "models"
TINY_FLUX = ROOT / "assets" / "tiny-flux"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

Spoil = Callable[[Path], object]
"""Makes a model folder hostile."""


def lay_model(folder: Path, source: Path = TINY_MODEL) -> Path:
    """Makes a model folder of links to the small model's files, each of which can be replaced."""
    model = folder / "model"
    for path in source.rglob("*"):
        if path.is_file():
            link = model / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return model


def lay_train(source: Path, spoil: Spoil, folder: Path, draw: random.Random) -> Attack:
    model = lay_model(folder, source)
    spoil(model)
    lay_pictures(folder)
    attack = train(folder, str(model))
    return Attack((*attack.words, f"pretrained_model_name_or_path={model}"), attack.culprits)


def lay_plan(source: Path, spoil: Spoil, folder: Path, draw: random.Random) -> Attack:
    words = lay_train(source, spoil, folder, draw).words
    return Attack(("plan", *words[2:]), (str(folder / "model"),))


def lay_sample(source: Path, spoil: Spoil, folder: Path, draw: random.Random) -> Attack:
    model = lay_model(folder, source)
    spoil(model)
    words = ("sample", "--model", model, "--prompt", "a face", "--steps", 1, "--width", 32, "--height", 32,
             "--weights-format", "fp32", "--output", folder / "out")  # fmt: skip
    return Attack(tuple(map(str, words)), (str(model),))


def lay_count(source: Path, spoil: Spoil, folder: Path, draw: random.Random) -> Attack:
    """Captions counted by the model's tokenizer alone."""
    model = lay_model(folder, source)
    spoil(model)
    attack = lay_caption(b"a face of a cat", folder / "pictures", draw)
    return Attack((*attack.words, "--model", str(model)), (str(model),))


WAYS = {"train": lay_train, "plan": lay_plan, "sample": lay_sample, "validate": lay_count}


# ---- ways to spoil


def own(path: Path) -> Path:
    """Makes a link to a file of the small model a file of its own."""
    if path.is_symlink():
        source = path.resolve()
        path.unlink()
        shutil.copyfile(source, path)
    return path


def edit(name: str, **changes: Any) -> Spoil:
    """Changes keys of a JSON file; `__` in a name stands for a level, and `...` leaves a key out."""

    def spoil(model: Path) -> None:
        path = own(model / name)
        whole = json.loads(path.read_text())
        for key, value in changes.items():
            *parents, last = key.split("__") if not key.startswith("__") else [key]
            inner = whole
            for parent in parents:
                inner = inner[parent]
            if value is ...:
                inner.pop(last, None)
            else:
                inner[last] = value
        path.write_text(json.dumps(whole))

    return spoil


def write(name: str, data: bytes | str | Callable[[], bytes]) -> Spoil:
    def spoil(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        put(model / name, data() if callable(data) else data)

    return spoil


def remove(*names: str) -> Spoil:
    def spoil(model: Path) -> None:
        for name in names:
            shutil.rmtree(model / name) if (model / name).is_dir() else (model / name).unlink()

    return spoil


def become(name: str, kind: str) -> Spoil:

    return lambda model: replace_by(model / name, kind)


def all_of(*spoils: Spoil) -> Spoil:
    def spoil(model: Path) -> None:
        for each in spoils:
            each(model)

    return spoil


def change_header(
    name: str, change: Callable[[dict[str, Any]], object], data: Callable[[bytes], bytes] = bytes
) -> Spoil:
    """Changes the header of a weight file."""

    def spoil(model: Path) -> None:
        path = model / name
        whole = path.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8:start])
        metadata = header.pop("__metadata__", None)
        change(header)
        path.unlink()
        path.write_bytes(safetensors(header, data(whole[start:]), metadata))

    return spoil


def shard(places: Callable[[dict[str, str]], object], also: Spoil = lambda model: None) -> Spoil:
    """Divides the transformer's weights among two files with an index, which is changed by `places`."""

    def spoil(model: Path) -> None:
        folder = model / "transformer"
        path = folder / WEIGHTS
        whole = path.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8:start])
        header.pop("__metadata__", None)
        names = sorted(header)
        path.unlink()
        where: dict[str, str] = {}
        for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
            file = f"diffusion_pytorch_model-{number:05d}-of-00002.safetensors"
            entries, data = {}, b""
            for name in part:
                begin, end = header[name]["data_offsets"]
                entries[name] = place(len(data), len(data) + end - begin, header[name]["shape"], header[name]["dtype"])
                data += whole[start + begin : start + end]
                where[name] = file
            (folder / file).write_bytes(safetensors(entries, data, {"format": "pt"}))
        index = {"metadata": {"total_size": len(whole) - start}, "weight_map": where}
        changed = places(where)
        put(folder / INDEX, json.dumps(index if changed is None else changed))
        also(model)

    return spoil


def twin(part: str, name: str) -> Spoil:
    def spoil(model: Path) -> None:
        (file,) = (model / part).glob("*.safetensors")
        shutil.copyfile(file, model / part / name)

    return spoil


def first(header: dict[str, Any]) -> dict[str, Any]:
    return header[min(header)]


def _from_the_start(entry: dict[str, Any]) -> list[int]:
    begin, end = entry["data_offsets"]
    return [0, end - begin]


def all_nan(data: bytes) -> bytes:
    return b"\xff" * len(data)


EVIL = """import os
os.system("touch executed")
class Evil:
    def __init__(self, *a, **k): os.system("touch executed")
"""
AUTO_MAP = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}

SHARED: dict[str, tuple[Spoil, str]] = {  # what it is: how it is made, what is expected
    "no change": (lambda model: None, TAKEN),
    "no index of parts": (remove("model_index.json"), REFUSED),
    "an index of parts that is a list": (write("model_index.json", "[]"), REFUSED),
    "an index of parts that is no JSON": (write("model_index.json", "{"), REFUSED),
    "an index of parts 100,000 deep": (write("model_index.json", nested(100_000)), REFUSED),
    "an index of parts of 15 MB": (write("model_index.json", lambda: b"[" + b"[]," * 5_000_000 + b"1]"), REFUSED),
    "an index of parts of 70 MB": (write("model_index.json", lambda: b" " * 70_000_000 + b"{}"), REFUSED),
    "a part upwards": (edit("model_index.json", **{"../../etc": ["diffusers", "x"]}), REFUSED),
    "a part at the root": (edit("model_index.json", **{"/etc": ["diffusers", "x"]}), REFUSED),
    "a part of Windows": (edit("model_index.json", **{"..\\..\\x": ["diffusers", "x"]}), REFUSED),
    "a part of escape codes": (edit("model_index.json", **{ESCAPE: ["diffusers", "x"]}), REFUSED),
    "a part with a zero byte": (edit("model_index.json", **{"a\0b": ["diffusers", "x"]}), REFUSED),
    "an absent part": (edit("model_index.json", more=["diffusers", "x"]), REFUSED),
    "a pipeline of its own": (edit("model_index.json", _class_name=["evil", "Evil"]), REFUSED),
    "a pipeline of escape codes": (edit("model_index.json", _class_name=ESCAPE), REFUSED),
    "another pipeline": (edit("model_index.json", _class_name="StableDiffusionPipeline"), REFUSED),
    "a transformer of its own class": (
        all_of(
            edit("model_index.json", transformer=["evil", "Evil"]),
            write("transformer/evil.py", EVIL),
            write("evil.py", EVIL),
        ),
        EITHER,
    ),
    "a text encoder of its own class": (
        all_of(edit("model_index.json", text_encoder=["evil", "Evil"]), write("text_encoder/evil.py", EVIL)),
        EITHER,
    ),
    "code for everything": (
        all_of(
            *(
                edit(f"{part}/config.json", auto_map=AUTO_MAP, trust_remote_code=True)
                for part in ("transformer", "vae", "text_encoder")
            ),
            *(write(f"{part}/evil.py", EVIL) for part in ("transformer", "vae", "text_encoder", "tokenizer")),
            edit("tokenizer/tokenizer_config.json", auto_map=AUTO_MAP, trust_remote_code=True),
        ),
        EITHER,
    ),
    "a tokenizer of its own class": (
        all_of(
            edit(
                "tokenizer/tokenizer_config.json",
                tokenizer_class="Evil",
                auto_map={"AutoTokenizer": ["evil.Evil", None]},
            ),
            write("tokenizer/evil.py", EVIL),
        ),
        EITHER,
    ),
    "a tokenizer from the hub": (
        edit(
            "tokenizer/tokenizer_config.json",
            tokenizer_class="Evil",
            auto_map={"AutoTokenizer": ["someone/evil--evil.Evil", None]},
        ),
        EITHER,
    ),
    "a text encoder of another kind": (
        edit("text_encoder/config.json", model_type="bert", architectures=["BertModel"]),
        EITHER,
    ),
    "a quantizer of its own": (edit("text_encoder/config.json", quantization_config={"quant_method": "evil"}), EITHER),
    "weights as a zip of a pickle": (
        all_of(remove(f"transformer/{WEIGHTS}"), write("transformer/diffusion_pytorch_model.bin", zip_of_a_pickle)),
        REFUSED,
    ),
    "weights as a pickle under their name": (write(f"transformer/{WEIGHTS}", pickle.dumps(Executed())), REFUSED),
    "an autoencoder as a pickle": (
        all_of(remove(f"vae/{WEIGHTS}"), write("vae/diffusion_pytorch_model.bin", pickle.dumps(Executed()))),
        REFUSED,
    ),
    "a text encoder as a pickle": (
        all_of(remove("text_encoder/model.safetensors"), write("text_encoder/pytorch_model.bin", zip_of_a_pickle)),
        REFUSED,
    ),
    "pickles beside all weights": (
        all_of(
            *(write(f"{part}/pytorch_model.bin", zip_of_a_pickle) for part in ("vae", "text_encoder", "transformer"))
        ),
        TAKEN,
    ),
    "a checkpoint of torch beside it": (write("model.ckpt", zip_of_a_pickle), TAKEN),
    "an index upwards": (shard(lambda places: places.update({min(places): "../../../etc/passwd"})), REFUSED),
    "an index to the root": (shard(lambda places: places.update({min(places): "/etc/passwd"})), REFUSED),
    "an index to a folder of Windows": (shard(lambda places: places.update({min(places): "C:\\x"})), REFUSED),
    "an index to an absent shard": (shard(lambda places: places.update({min(places): "absent.safetensors"})), REFUSED),
    "an index to a pickle": (
        shard(lambda places: places.update({min(places): "x.bin"}), write("transformer/x.bin", zip_of_a_pickle)),
        REFUSED,
    ),
    "an index of escape codes": (shard(lambda places: places.update({ESCAPE: ESCAPE})), REFUSED),
    "an index of numbers": (shard(lambda places: {"weight_map": {**places, min(places): 7}}), REFUSED),
    "an index that is a list": (shard(lambda places: [1]), REFUSED),
    "an index without a map": (shard(lambda places: {"metadata": {}}), REFUSED),
    "an index of an empty map": (shard(lambda places: {"weight_map": {}}), REFUSED),
    "an index of names that no file has": (shard(lambda places: places.update(extra=max(places.values()))), REFUSED),
    "an index to its own folder": (shard(lambda places: places.update({min(places): "."})), REFUSED),
    "shards that are exchanged": (
        shard(lambda places: {"weight_map": {name: min(places.values()) for name in places}}),
        REFUSED,
    ),
    "an index for names with line ends": (
        shard(lambda places: places.update({min(places): "a\nb.safetensors"})),
        REFUSED,
    ),
    "one of two shards": (
        shard(lambda places: None, remove("transformer/diffusion_pytorch_model-00002-of-00002.safetensors")),
        REFUSED,
    ),
    "shards without an index": (shard(lambda places: None, remove(f"transformer/{INDEX}")), REFUSED),
    "a shard too many": (shard(lambda places: None, twin("vae", "x.safetensors")), EITHER),
    "two good shards": (shard(lambda places: None), TAKEN),
    "an fp16 twin": (twin("transformer", "diffusion_pytorch_model.fp16.safetensors"), TAKEN),
    "a nameless twin": (twin("transformer", "other.safetensors"), REFUSED),
    "half of the weights": (
        lambda model: (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]))(
            own(model / "transformer" / WEIGHTS)
        ),
        REFUSED,
    ),
    "no weights": (write(f"transformer/{WEIGHTS}", b""), REFUSED),
    "weights of NaN": (change_header(f"transformer/{WEIGHTS}", lambda header: None, all_nan), REFUSED),
    "an autoencoder of NaN": (change_header(f"vae/{WEIGHTS}", lambda header: None, all_nan), REFUSED),
    "a text encoder of NaN": (change_header("text_encoder/model.safetensors", lambda header: None, all_nan), REFUSED),
    "weights of whole numbers": (
        change_header(f"transformer/{WEIGHTS}", lambda header: first(header).update(dtype="I32")),
        EITHER,
    ),
    "a tensor too many": (
        change_header(f"transformer/{WEIGHTS}", lambda header: header.update({"evil.weight": {**first(header)}})),
        REFUSED,
    ),
    "a tensor too few": (change_header(f"transformer/{WEIGHTS}", lambda header: header.pop(min(header))), REFUSED),
    "tensors that overlap": (
        change_header(
            f"transformer/{WEIGHTS}",
            lambda header: header[max(header)].update(data_offsets=_from_the_start(header[max(header)])),
        ),
        REFUSED,
    ),
    "a tensor of Python's names": (
        change_header(
            f"transformer/{WEIGHTS}", lambda header: header.update({"__class__.__name__": header.pop(min(header))})
        ),
        REFUSED,
    ),
    "a tensor of 2^60 numbers": (
        change_header(f"transformer/{WEIGHTS}", lambda header: first(header).update(shape=[2**30, 2**30])),
        REFUSED,
    ),
    "tensors of other shapes": (
        change_header(
            f"transformer/{WEIGHTS}",
            lambda header: [entry.update(shape=entry["shape"][::-1]) for entry in header.values()],
        ),
        REFUSED,
    ),
    "an autoencoder's tensors of other shapes": (
        change_header(
            f"vae/{WEIGHTS}", lambda header: [entry.update(shape=entry["shape"][::-1]) for entry in header.values()]
        ),
        REFUSED,
    ),
    "a text encoder's tensors of other shapes": (
        change_header(
            "text_encoder/model.safetensors",
            lambda header: [entry.update(shape=entry["shape"][::-1]) for entry in header.values()],
        ),
        REFUSED,
    ),
    "a text encoder that lacks a tensor": (
        change_header("text_encoder/model.safetensors", lambda header: header.pop(max(header))),
        REFUSED,
    ),
    "an autoencoder that lacks a tensor": (
        change_header(f"vae/{WEIGHTS}", lambda header: header.pop(max(header))),
        REFUSED,
    ),
    "weights of 1 TB": (
        lambda model: (
            remove(f"transformer/{WEIGHTS}")(model),
            put_sparse(
                model / "transformer" / WEIGHTS,
                2**40 + 200,
                safetensors({"img_in.weight": place(0, 2**40, [2**19, 2**19])}),
            ),
        ),
        REFUSED,
    ),
    "a billion layers": (edit("transformer/config.json", num_layers=10**9), REFUSED),
    "-1 layers": (edit("transformer/config.json", num_layers=-1), REFUSED),
    "no layers": (edit("transformer/config.json", num_layers=0), REFUSED),
    "layers as a text": (edit("transformer/config.json", num_layers="5"), REFUSED),
    "a million heads": (edit("transformer/config.json", num_attention_heads=10**6), REFUSED),
    "heads of 10^12": (edit("transformer/config.json", attention_head_dim=10**12), REFUSED),
    "negative heads": (edit("transformer/config.json", num_attention_heads=-4), REFUSED),
    "no heads": (edit("transformer/config.json", num_attention_heads=0), REFUSED),
    "a text width of 10^15": (edit("transformer/config.json", joint_attention_dim=10**15), REFUSED),
    "a width that is NaN": (edit("transformer/config.json", attention_head_dim=float("nan")), REFUSED),
    "a width that is a list": (edit("transformer/config.json", attention_head_dim=[64]), REFUSED),
    "a transformer without a config": (remove("transformer/config.json"), REFUSED),
    "a config that is a list": (write("transformer/config.json", "[]"), REFUSED),
    "an autoencoder of 10^9 blocks": (edit("vae/config.json", num_res_blocks=10**9), REFUSED),
    "an autoencoder of 10^9 channels": (edit("vae/config.json", z_dim=10**9), REFUSED),
    "an autoencoder of no config": (remove("vae/config.json"), REFUSED),
    "an autoencoder without statistics": (edit("vae/config.json", latents_mean=...), EITHER),
    "an autoencoder of short statistics": (edit("vae/config.json", latents_mean=[0.0]), EITHER),
    "an autoencoder of statistics of 0": (edit("vae/config.json", latents_std=[0.0] * 16), REFUSED),
    "an autoencoder of statistics that are texts": (edit("vae/config.json", latents_mean=["x"] * 16), REFUSED),
    "an autoencoder of a million halvings": (edit("vae/config.json", temperal_downsample=[True] * 1_000_000), REFUSED),
    "an autoencoder of halvings that are a text": (edit("vae/config.json", temperal_downsample=7), REFUSED),
    "a text encoder of 10^9 layers": (edit("text_encoder/config.json", text_config__num_hidden_layers=10**9), REFUSED),
    "a text encoder of 10^9 pictures' layers": (edit("text_encoder/config.json", vision_config__depth=10**9), REFUSED),
    "a text encoder of 10^12 words": (edit("text_encoder/config.json", text_config__vocab_size=10**12), REFUSED),
    "a text encoder of 10^12 positions": (
        edit("text_encoder/config.json", text_config__max_position_embeddings=10**12),
        EITHER,
    ),
    "a text encoder of negative width": (edit("text_encoder/config.json", text_config__hidden_size=-128), REFUSED),
    "a text encoder of an activation of its own": (
        edit("text_encoder/config.json", text_config__hidden_act="os.system"),
        REFUSED,
    ),
    "a text encoder of rotations of its own": (
        edit("text_encoder/config.json", text_config__rope_parameters={"rope_type": "evil"}),
        REFUSED,
    ),
    "a text encoder of a number format of its own": (
        edit("text_encoder/config.json", dtype="evil", text_config__dtype="evil"),
        EITHER,
    ),
    "a text encoder of attention of its own": (
        edit(
            "text_encoder/config.json",
            _attn_implementation="someone/evil-kernel",
            attn_implementation="someone/evil-kernel",
        ),
        EITHER,
    ),
    "a tokenizer that is no JSON": (write("tokenizer/tokenizer.json", "{"), REFUSED),
    "a tokenizer of zero bytes": (write("tokenizer/tokenizer.json", bytes(1000)), REFUSED),
    "a tokenizer 100,000 deep": (write("tokenizer/tokenizer.json", nested(100_000)), REFUSED),
    "a tokenizer of nothing": (write("tokenizer/tokenizer.json", "{}"), REFUSED),
    "no tokenizer": (remove("tokenizer/tokenizer.json"), REFUSED),
    "a tokenizer of other words": (
        edit("tokenizer/tokenizer.json", model__vocab={"a": 10**9}, model__merges=[]),
        REFUSED,
    ),
    "a tokenizer of numbers beyond the encoder": (lambda model: _shift_words(model), REFUSED),
    "a tokenizer of negative numbers": (
        edit("tokenizer/tokenizer.json", model__vocab={"a": -5}, model__merges=[]),
        REFUSED,
    ),
    "a tokenizer's config that is a list": (write("tokenizer/tokenizer_config.json", "[]"), REFUSED),
    "a tokenizer's config that is no JSON": (write("tokenizer/tokenizer_config.json", "{"), REFUSED),
    "a tokenizer that reads -1 words": (edit("tokenizer/tokenizer_config.json", model_max_length=-1), EITHER),
    "a scheduler that is a list": (write("scheduler/scheduler_config.json", "[]"), REFUSED),
    "a scheduler that is no JSON": (write("scheduler/scheduler_config.json", "{"), REFUSED),
    "no scheduler": (remove("scheduler/scheduler_config.json"), REFUSED),
    "a scheduler of texts": (edit("scheduler/scheduler_config.json", base_shift="x"), REFUSED),
    "a scheduler of NaN": (edit("scheduler/scheduler_config.json", base_shift=float("nan")), REFUSED),
    "a scheduler that divides by zero": (
        edit("scheduler/scheduler_config.json", base_image_seq_len=64, max_image_seq_len=64),
        REFUSED,
    ),
    "a scheduler that shifts by 1e308": (
        edit("scheduler/scheduler_config.json", base_shift=1e308, max_shift=-1e308),
        REFUSED,
    ),
    "a scheduler with a shift of -1": (
        edit("scheduler/scheduler_config.json", use_dynamic_shifting=False, shift=-1),
        REFUSED,
    ),
    "a scheduler of 10^12 steps": (edit("scheduler/scheduler_config.json", num_train_timesteps=10**12), EITHER),
    "a folder that links to itself": (
        all_of(remove("vae"), lambda model: (model / "vae").symlink_to(model / "vae")),
        REFUSED,
    ),
    "a folder that links upwards": (lambda model: (model / "vae" / "up").symlink_to(model), TAKEN),
    "a part that is a file": (lambda model: (remove("vae")(model), put(model / "vae", b"")), REFUSED),
    **{
        f"weights that are {kind}": (become(f"transformer/{WEIGHTS}", kind), REFUSED)
        for kind in ("a named pipe", "a device", "a folder", "a link to itself", "1 TB")
    },
    **{
        f"a config that is {kind}": (become("vae/config.json", kind), REFUSED)
        for kind in ("a named pipe", "a device", "a folder", "a link to itself", "1 TB")
    },
    **{
        f"a tokenizer that is {kind}": (become("tokenizer/tokenizer.json", kind), REFUSED)
        for kind in ("a named pipe", "a device", "a folder", "a link to itself", "1 TB")
    },
    **{
        f"a tokenizer's config that is {kind}": (become("tokenizer/tokenizer_config.json", kind), REFUSED)
        for kind in ("a named pipe", "a device", "1 TB")
    },
    **{
        f"a needless file that is {kind}": (become(f"{part}/extra.json", kind), EITHER)
        for kind in ("a named pipe", "a device", "1 TB")
        for part in ("tokenizer", "text_encoder")
    },
}

OF_FLUX: dict[str, tuple[Spoil, str]] = {
    "no change": (lambda model: None, TAKEN),
    "a billion layers": (edit("transformer/config.json", num_layers=10**9), REFUSED),
    "a billion single layers": (edit("transformer/config.json", num_single_layers=10**9), REFUSED),
    "a T5 of 10^9 layers": (edit("text_encoder_2/config.json", num_layers=10**9), REFUSED),
    "a CLIP of 10^9 layers": (edit("text_encoder/config.json", num_hidden_layers=10**9), REFUSED),
    "a CLIP of 10^12 positions": (edit("text_encoder/config.json", max_position_embeddings=10**12), REFUSED),
    "an autoencoder of 10^9 blocks": (edit("vae/config.json", layers_per_block=10**9), REFUSED),
    "an autoencoder without a scale": (edit("vae/config.json", scaling_factor=None, shift_factor=None), EITHER),
    "an autoencoder of a scale of 0": (edit("vae/config.json", scaling_factor=0.0), EITHER),
    "an autoencoder of classes of its own": (edit("vae/config.json", down_block_types=["os.system"]), REFUSED),
    "CLIP's tokenizer is a named pipe": (become("tokenizer/tokenizer.json", "a named pipe"), REFUSED),
    "T5's tokenizer is a named pipe": (become("tokenizer_2/tokenizer.json", "a named pipe"), REFUSED),
    "T5's tokenizer is nothing": (write("tokenizer_2/tokenizer.json", "{}"), REFUSED),
    "CLIP's tokenizer reads 10^9 words": (edit("tokenizer/tokenizer_config.json", model_max_length=10**9), EITHER),
    "a second text encoder as a pickle": (
        all_of(remove("text_encoder_2/model.safetensors"), write("text_encoder_2/pytorch_model.bin", zip_of_a_pickle)),
        REFUSED,
    ),
}


def _shift_words(model: Path) -> None:
    path = own(model / "tokenizer" / "tokenizer.json")
    whole = json.loads(path.read_text())
    whole["model"]["vocab"] = {word: number + 10**6 for word, number in whole["model"]["vocab"].items()}
    path.write_text(json.dumps(whole))


def cases() -> Iterator[Case]:
    """Yields the cases: every model is trained on; some are planned, sampled and counted by as well."""
    for what, (spoil, expected) in SHARED.items():
        yield Case(MODELS, what, partial(lay_train, TINY_MODEL, spoil), expected)
        if any(word in what for word in ("layers", "heads", "width", "index", "named pipe", "1 TB", "halvings")):
            yield Case(MODELS, f"{what} (plan)", partial(lay_plan, TINY_MODEL, spoil))
        if any(word in what for word in ("scheduler", "NaN", "code", "pickle", "statistics")):
            yield Case(MODELS, f"{what} (sample)", partial(lay_sample, TINY_MODEL, spoil))
        if "tokenizer" in what:
            yield Case(MODELS, f"{what} (validate)", partial(lay_count, TINY_MODEL, spoil))
    for what, (spoil, expected) in OF_FLUX.items():
        yield Case(MODELS, f"FLUX: {what}", partial(lay_train, TINY_FLUX, spoil), expected)
