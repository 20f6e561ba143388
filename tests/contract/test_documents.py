"""contract.md section 7: documents that the user expects, at their paths and with what must be in them."""

from __future__ import annotations

import pytest

from tests.runs import ROOT

SPARK_PLAN = "plans/2025-11-16-dgx-spark-unified-memory.md"
DOCUMENTS = {
    "GPU_COMPATIBILITY.md": ("DGX Spark", "RTX 4090", "H100"),
    "AARCH64_SBSA_COMPATIBILITY.md": (
        "PyPI torch overwrote my wheels", "libcudnn.so.9 not found", "FA3 crashes on ARM64", "cuDNN 9", "SageAttention",
    ),
    "FASTSAFETENSORS_INTEGRATION.md": ("use_fastsafetensors", "fastsafetensors_num_threads"),
    SPARK_PLAN: ("unified_memory", "expandable_segments", "memory_fraction"),
}  # fmt: skip


def missing(name: str) -> pytest.MarkDecorator:
    absent = not (ROOT / "docs" / name).is_file()
    return pytest.mark.xfail(absent, raises=FileNotFoundError, strict=True, reason=f"docs/{name} is not written yet")


@pytest.mark.parametrize("name", [pytest.param(name, marks=missing(name)) for name in DOCUMENTS])
def test_a_document_is_there_and_says_what_is_asked_of_it(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert not [words for words in DOCUMENTS[name] if words not in text]
