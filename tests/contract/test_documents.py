"""contract.md section 7: documents that the user expects, at their paths and with what must be in them."""

from __future__ import annotations

import pytest

from tests.runs import ROOT

DOCUMENTS = {
    "GPU_COMPATIBILITY.md": ("train_lora_4090.yaml", "train_dgx_spark.yaml", "FlashAttention 3", "fp8"),
    "AARCH64_SBSA_COMPATIBILITY.md": (
        "PyPI torch overwrote my wheels", "libcudnn.so.9", "FA3 crashes on ARM64", "sm_121 wheel", "requirements.txt",
    ),
    "FASTSAFETENSORS_INTEGRATION.md": ("use_fastsafetensors", "fastsafetensors_num_threads"),
    "plans/2025-11-16-dgx-spark-unified-memory.md": ("unified_memory", "expandable_segments", "memory_fraction"),
}  # fmt: skip
INSTALL_ORDER = ("**cuDNN 9**", "**ONNX**", "**PyTorch.**", "**SageAttention**", "`pip install -r requirements.txt`")


def missing(name: str) -> pytest.MarkDecorator:
    absent = not (ROOT / "docs" / name).is_file()
    return pytest.mark.xfail(absent, raises=FileNotFoundError, strict=True, reason=f"docs/{name} is not written yet")


@pytest.mark.parametrize("name", [pytest.param(name, marks=missing(name)) for name in DOCUMENTS])
def test_a_document_is_there_and_says_what_is_asked_of_it(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert not [words for words in DOCUMENTS[name] if words not in text]


def test_the_install_order_of_a_dgx_spark() -> None:
    text = (ROOT / "docs" / "AARCH64_SBSA_COMPATIBILITY.md").read_text(encoding="utf-8")
    places = [text.index(step) for step in INSTALL_ORDER]
    assert places == sorted(places)
