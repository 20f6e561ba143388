"""What a run on a small model imports; see `tests/processes.py`. Imported by the process that forks, and by no test."""

from __future__ import annotations

import gc
import importlib
import logging
import os

LIBRARIES = (
    "bitsandbytes",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.autoencoders.autoencoder_kl_qwenimage",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.models.transformers.transformer_qwenimage",
    "diffusers.optimization",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage",
    "peft.tuners.lora",
    "torch.utils.tensorboard",
    "transformers.models.clip.modeling_clip",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.t5.modeling_t5",
    "pixtune.bench.steps",
    "pixtune.cli",
    "pixtune.commands.sample",
    "pixtune.trained.export",
    "pixtune.report",
    "pixtune.train",
)

os.fsync = lambda fd: None  # as tests/conftest.py does
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # as pixtune.cli does
for name in LIBRARIES:
    importlib.import_module(name)
gc.collect()
gc.freeze()  # children share these pages as long as no collection touches them
