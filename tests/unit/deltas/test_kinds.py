"""What a run trains, of each kind, is what the tools read of its files: each weight comes out as PEFT merges it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from pixtune.deltas.adapter_file import read_adapter
from pixtune.deltas.delta import changed_weight
from pixtune.deltas.writing import carried_metadata, settled, write_adapter
from pixtune.families import FAMILIES
from pixtune.trained import adapters
from pixtune.trained.export import COMFYUI_FILE, DIFFUSERS_FILE, export_lora
from tests.unit.trained.test_adapter_kinds import SCHEMES, about, adapted, base, of_peft

FAMILY = FAMILIES["qwen_image"]


@pytest.mark.parametrize("kind", SCHEMES)
def test_weights_come_out_as_peft_merges_them(kind: str, tmp_path: Path) -> None:
    from peft import set_peft_model_state_dict

    scheme, weights = SCHEMES[kind], adapters.lora_weights(adapted(kind))
    scales = adapters.dora_scales(adapted(kind), weights)
    export_lora(tmp_path, weights, about(kind), FAMILY, dora_scales=scales)
    peft: Any = of_peft(scheme, copy.deepcopy(base()))
    set_peft_model_state_dict(peft, dict(weights))
    files = [tmp_path / DIFFUSERS_FILE]
    if scheme.kind != "dora":
        files.append(tmp_path / COMFYUI_FILE)
        source = read_adapter(files[0])
        files.append(tmp_path / "kohya.safetensors")
        write_adapter(files[-1], settled(source), "kohya", FAMILY, carried_metadata(source.metadata))
    for file in files:
        changes = read_adapter(file).changes
        assert len(changes) == len({name.rsplit(".lo", 1)[0] for name in weights})
        for layer in [*changes][::5]:
            module = copy.deepcopy(peft.get_submodule(layer))
            before = module.get_base_layer().weight.detach().clone()
            module.merge()
            expected = module.get_base_layer().weight.detach()
            assert not expected.equal(before)
            with torch.no_grad():
                found = changed_weight(before, [changes[layer]])[0]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
