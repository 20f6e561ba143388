"""The section of a config that names a model's parts one by one, where not all of them lie in one folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pixtune.config.section import Section
from pixtune.config.values import FilePath, Name


class ModelParts(Section):
    """Keys of the parts of a model that lie elsewhere than the others, each a folder or a file."""

    others: Name | None = None
    """Folder in diffusers' layout, or hub name, of a model that gives the parts which have no key here, where
    `pretrained_model_name_or_path` is a transformer's file. Of a hub name only those parts are downloaded. Absent:
    each part has its key."""
    pipeline: Name | None = None
    """Class of the pipeline that the parts make up, where no folder names one: QwenImageEditPlusPipeline, for example.
    Absent: the one that makes pictures from text with such a transformer."""
    transformer: FilePath | None = None
    """Transformer: one .safetensors file as ComfyUI has it, in 16 bits, fp8 with or without scales, or int8 with
    rotated rows; or a folder. Absent: that of `pretrained_model_name_or_path`."""
    vae: FilePath | None = None
    """Autoencoder: its folder, with a config.json. Absent: that of the folder with the other parts."""
    text_encoder: FilePath | None = None
    """Text encoder: its folder, with a config.json. FLUX.1's is CLIP. Absent: that of the folder with the other
    parts."""
    text_encoder_2: FilePath | None = None
    """Second text encoder, FLUX.1's T5: its folder, with a config.json. Absent: that of the folder with the other
    parts."""
    tokenizer: FilePath | None = None
    """Folder of the tokenizer. Absent: that of the folder with the other parts."""
    tokenizer_2: FilePath | None = None
    """Folder of T5's tokenizer. Absent: that of the folder with the other parts."""
    processor: FilePath | None = None
    """Folder of the processor that brings control pictures before Qwen-Image-Edit's text encoder. Absent: that of the
    folder with the other parts."""
    scheduler: FilePath | None = None
    """Folder of the scheduler, which holds a scheduler_config.json. Absent: that of the folder with the other
    parts."""

    @property
    def named(self) -> Mapping[str, Path]:
        """Places of the parts that have a key here, by the parts' names."""
        places = {name: getattr(self, name) for name in PARTS}
        return {name: place for name, place in places.items() if place is not None}


PARTS = (
    "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "processor", "scheduler",
)  # fmt: skip
NO_PARTS = ModelParts()
"""Every part lies in the model's own folder."""
