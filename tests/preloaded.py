"""What a run on a small model imports; see `tests/processes.py`. Imported by the process that forks, and by no test."""

from __future__ import annotations

import gc
import importlib
import logging
import os

from PIL import Image

LIBRARIES = (
    "bitsandbytes",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.autoencoders.autoencoder_kl_qwenimage",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.models.transformers.transformer_qwenimage",
    "diffusers.optimization",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage",
    "peft.tuners.lora",
    "numpy.ma",
    "peft.tuners.lora.bnb",
    "torch.utils.tensorboard",
    "tests.processes",
    "transformers.models.clip.modeling_clip",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    "transformers.models.t5.modeling_t5",
    "pixtune.bench.steps",
    "pixtune.cli",
    "pixtune.commands.sample",
    "pixtune.engine.attention_trial",
    "pixtune.families.qwen_clean_controls",
    "pixtune.families.qwen_attention",
    "pixtune.families.qwen_frames",
    "pixtune.families.flux_blocks",
    "pixtune.trained.export",
    "pixtune.report",
    "pixtune.train",
)

os.fsync = lambda fd: None  # as tests/conftest.py does
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # as pixtune.cli does
for name in LIBRARIES:
    importlib.import_module(name)
Image.init()
gc.collect()
gc.freeze()  # children share these pages as long as no collection touches them
