"""contract.md section 6: what the document asks of the code's behaviour."""

from __future__ import annotations

import importlib
import logging
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pixtune import assembly
from pixtune.assembly import assemble
from pixtune.config import load_config
from pixtune.engine.apply import load_planned
from pixtune.engine.load import LoadedTransformer
from pixtune.families import family_of
from pixtune.family import TextEncoder
from pixtune.launch.accelerator import start_accelerator
from pixtune.storage.model_folder import open_model_folder
from pixtune.train import forward_backward, train
from tests.contract.not_yet import needs
from tests.contract.observe import BASE, words
from tests.runs import TINY_MODEL


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[nn.Module]]:
    """Text encoder and autoencoder, as soon as they are loaded."""
    # Its first import logs an error with all frames above it, which pytest keeps: not while an encoder is in them.
    importlib.import_module("bitsandbytes")
    seen: list[weakref.ref[nn.Module]] = []
    kind = type(family_of(open_model_folder(str(TINY_MODEL))))
    load_text_encoder, load_autoencoder = kind.load_text_encoder, kind.load_autoencoder

    def watched_text_encoder(family: Any, *arguments: Any) -> TextEncoder:
        encoder = load_text_encoder(family, *arguments)
        seen.extend(map(weakref.ref, encoder.models))
        return encoder

    def watched_autoencoder(family: Any, *arguments: Any) -> nn.Module:
        autoencoder = load_autoencoder(family, *arguments)
        seen.append(weakref.ref(autoencoder))
        return autoencoder

    monkeypatch.setattr(kind, "load_text_encoder", watched_text_encoder)
    monkeypatch.setattr(kind, "load_autoencoder", watched_autoencoder)
    return seen


def alive_when_the_base_is_loaded(
    encoders: list[weakref.ref[nn.Module]], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> list[bool]:
    alive: list[bool] = []

    def load(*arguments: Any) -> LoadedTransformer:
        alive.extend(reference() is not None for reference in encoders)
        return load_planned(*arguments)

    monkeypatch.setattr(assembly, "load_planned", load)
    assemble(load_config(None, arguments), forward_backward)
    return alive


FRESH = {"data_config.cache_dir": "RUN/cache"}


def test_pattern_1_encoders_leave_before_the_base_is_loaded(
    encoders: list[weakref.ref[nn.Module]], monkeypatch: pytest.MonkeyPatch, scene: Path, tmp_path: Path
) -> None:
    arguments = words({**BASE, **FRESH}, scene, tmp_path)
    assert alive_when_the_base_is_loaded(encoders, monkeypatch, arguments) == [False, False]


@needs("unified_memory")
def test_pattern_1_encoders_stay_where_memory_is_unified(
    encoders: list[weakref.ref[nn.Module]], monkeypatch: pytest.MonkeyPatch, scene: Path, tmp_path: Path
) -> None:
    arguments = words({**BASE, **FRESH, "unified_memory": True}, scene, tmp_path)
    assert alive_when_the_base_is_loaded(encoders, monkeypatch, arguments) == [True, True]


@needs("unified_memory")
def test_pattern_2_the_environment_is_set_before_the_accelerator_and_memory_is_logged_after(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, scene: Path, tmp_path: Path
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "")
    found: list[str] = []

    def start(config: Any) -> Any:
        found.append("".join(os.environ[name] for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")))
        assert not torch.cuda.is_initialized() and not memory_lines(caplog)
        return start_accelerator(config)

    monkeypatch.setattr(assembly, "start_accelerator", start)
    with caplog.at_level(logging.INFO, "pixtune"):
        train(load_config(None, words({**BASE, "unified_memory": True}, scene, tmp_path)))
    assert len(found) == 1 and "expandable_segments:True" in found[0] and memory_lines(caplog)


@needs("quantize")
def test_pattern_3_no_block_is_held_in_full_precision(scene: Path, tmp_path: Path) -> None:
    """That it never was, block after block, is shown where the loading is tested: tests/unit."""
    run, _ = assemble(load_config(None, words({**BASE, "quantize": True}, scene, tmp_path)), forward_backward)
    frozen = [
        name
        for name, parameter in run.transformer.module.named_parameters()
        if "transformer_blocks" in name
        and "lora" not in name
        and not name.removesuffix(".weight").endswith(run.family.modulation_layers)  # one row a sample: they stay plain
        and parameter.ndim == 2
        and parameter.dtype.itemsize > 1
    ]
    assert not frozen


@needs("unified_memory")
def test_pattern_4_memory_is_logged_at_each_stage(
    caplog: pytest.LogCaptureFixture, scene: Path, tmp_path: Path
) -> None:
    with caplog.at_level(logging.INFO, "pixtune"):
        train(load_config(None, words({**BASE, **FRESH, "unified_memory": True}, scene, tmp_path)))
    lines = "\n".join(memory_lines(caplog))
    for stage in ("text encoding", "image encoding", "transformer"):
        assert stage in lines


def memory_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "GiB allocated" in record.getMessage()]
