"""Model folders of full size that hold nothing: real configs, and weight files with a true header and no data.

A file is made as long as its header says by `truncate`, so it takes no room on a disk. What reads headers alone cannot
tell such a folder from the real one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pixtune.config.schema import TrainConfig
from pixtune.families import FAMILIES
from pixtune.plan.footprint import Footprint, of_all_weights, read_footprint, with_average
from pixtune.planning import plain_linears, targeted_linears
from pixtune.trained.targets import adapter_of

Shapes = Mapping[str, Sequence[int]]

TEXT_ENCODER = {"qwen_image": {"text_encoder": 7_070_619_136}, "flux": {"text_encoder": 123_060_480,
                "text_encoder_2": 4_762_310_656}}  # fmt: skip
"""Parameters that reach a device: Qwen2.5-VL 7B; CLIP-L and T5-XXL. From their published files."""
UNREAD = {"qwen_image": {"lm_head.weight": 544_997_376, "visual.all": 676_550_144}, "flux": {}}
"""Those of the first text encoder that do not."""
AUTOENCODER = {"qwen_image": 126_892_531, "flux": 83_819_683}
TRANSFORMER_CONFIG: dict[str, dict[str, Any]] = {"qwen_image": {}, "flux": {"guidance_embeds": True}}
"""What differs from the defaults of diffusers' classes, which are the full-size models."""
AUTOENCODER_CONFIG = {
    "qwen_image": {"z_dim": 16, "temperal_downsample": [False, True, True]},
    "flux": {"latent_channels": 16, "block_out_channels": [128, 256, 512, 512]},
}
SHARDS = 3
WIDTH = 3072
TOKENS_1024 = {"qwen_image": 4096 + 256, "flux": 4096 + 512}
"""Of a picture of 1024x1024 pixels with a caption."""


@cache
def full_size_shapes(family_name: str) -> Shapes:
    """Of the transformer's tensors, from diffusers' own class."""
    model = FAMILIES[family_name].build_transformer(TRANSFORMER_CONFIG[family_name])
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def full_size_footprint(config: TrainConfig, family_name: str = "qwen_image") -> Footprint:
    """At 1024x1024, whatever `data_config.img_size` is."""
    family, shapes = FAMILIES[family_name], full_size_shapes(family_name)
    layers = [] if config.method == "full" else targeted_linears(config, family, shapes)
    footprint = read_footprint(
        family,
        shapes,
        WIDTH,
        config.batch_size * TOKENS_1024[family_name],
        layers,
        adapter_of(config, layers, family.lora_presets),
        config.batch_size * config.gradient_accumulation_steps,
        plain_linears(config.keep_plain, family, shapes),
        config.batch_size,
    )
    return of_all_weights(footprint, shapes) if config.method == "full" else with_average(footprint, config)


def build_full_size_folder(path: Path, family_name: str) -> Path:
    """A folder of a full-size model without data."""
    family = FAMILIES[family_name]
    model: Any = family.build_transformer(TRANSFORMER_CONFIG[family_name])
    names = [*TEXT_ENCODER[family_name], "vae", "transformer", "scheduler"]
    parts = {name: ["diffusers", "Part"] for name in names}
    _write_json(path / "model_index.json", {"_class_name": family.pipeline_classes[0], **parts})
    _write_json(path / "scheduler" / "scheduler_config.json", {})
    config = {key: list(v) if isinstance(v, tuple) else v for key, v in model.config.items()}
    _write_json(path / "transformer" / "config.json", config)
    write_shards(path / "transformer", full_size_shapes(family_name))
    _write_json(path / "vae" / "config.json", AUTOENCODER_CONFIG[family_name])
    write_empty_file(path / "vae" / "diffusion_pytorch_model.safetensors", {"all": (AUTOENCODER[family_name],)})
    for part, count in TEXT_ENCODER[family_name].items():
        _write_json(path / part / "config.json", {})
        unread = UNREAD[family_name] if part == "text_encoder" else {}
        shapes = {name: (size,) for name, size in {"model.all": count, **unread}.items()}
        write_empty_file(path / part / "model.safetensors", shapes)
    return path


def write_shards(folder: Path, shapes: Shapes) -> None:
    """Weight files with their index."""
    names = [f"diffusion_pytorch_model-{number + 1:05}-of-{SHARDS:05}.safetensors" for number in range(SHARDS)]
    places = {name: names[number * SHARDS // len(shapes)] for number, name in enumerate(shapes)}
    for file in names:
        write_empty_file(folder / file, {name: shape for name, shape in shapes.items() if places[name] == file})
    _write_json(folder / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": places})


def write_empty_file(file: Path, shapes: Shapes, dtype: str = "BF16") -> None:
    """A safetensors file of the right length with a true header; its data are a hole."""
    header, end = {}, 0
    size = {"BF16": 2, "F32": 4}[dtype]
    for name, shape in shapes.items():
        begin, end = end, end + size * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values), encoding="utf-8")
