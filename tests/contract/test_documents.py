"""contract.md section 7: documents that the user expects, at their paths and with what must be in them."""

from __future__ import annotations

import ast
import re
from functools import cache

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


# ---- places in the code that pages name

PAGES = ("file_tour.md", "dgx_spark.md", "decisions.md", "add_an_optimizer.md")
SOURCE = ROOT / "src" / "pixtune"
OTHER_FOLDERS = {"tests", "benchmarks", "scripts", "src"}
FILE = re.compile(r"`((?:[\w.]+/)*\w+\.py)(?:: (\w+))?`")
NAME = re.compile(r"(?:,| and) `(\w+)`")


def named_places(page: str) -> list[tuple[str, str | None]]:
    """Files and functions that a page names: `plan/rungs.py: ladder`, and further functions of that file behind it."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    places: list[tuple[str, str | None]] = []
    for match in FILE.finditer(text):
        file, end = match[1], match.end()
        places.append((file, match[2]))
        while match[2] and (more := NAME.match(text, end)):
            places.append((file, more[1]))
            end = more.end()
    return places


@cache
def names_in(file: str) -> set[str]:
    """Functions, classes, methods and constants that a file of the package defines."""
    nodes = list(ast.walk(ast.parse((SOURCE / file).read_text(encoding="utf-8"))))
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    targets = [target for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in nodes if isinstance(node, ast.AnnAssign)]
    return defined | {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_in_the_code_exists(page: str) -> None:
    found = [place for place in named_places(page) if not place[0].endswith("/NAME.py")]
    places = [(file, name) for file, name in found if file.partition("/")[0] not in OTHER_FOLDERS]
    assert places
    missing = [file for file, _ in places if not (SOURCE / file).is_file() and not (ROOT / file).is_file()]
    assert not missing, f"docs/{page} names files that are not there: {missing}"
    gone = [f"{file}: {name}" for file, name in places if name and name not in names_in(file)]
    assert not gone, f"docs/{page} names what its file does not define: {gone}"
