"""Contract C10: `pip install -r requirements.txt` installs everything and never replaces an installed torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

CUSTOM_TORCH = "2.10.0a0+cu130"  # what users of a DGX Spark build themselves: a pre-release with a local version


@pytest.fixture(scope="module")
def project(repo_root: Path) -> dict[str, Any]:
    return tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def pins(repo_root: Path) -> dict[NormalizedName, str]:
    lines = (repo_root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin) for pin in pins), "only name==version"
    return {canonicalize_name(name): version for name, version in (pin.split("==") for pin in pins)}


def all_requirements(project: dict[str, Any]) -> list[Requirement]:
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for text in [*project["dependencies"], *(text for extra in extras for text in extra)]]


def test_torch_stands_in_no_list(project, pins, repo_root):
    assert "torch" not in {requirement.name for requirement in all_requirements(project)}
    assert "torch" not in pins
    assert (repo_root / "requirements.txt").read_text(encoding="utf-8").split("\n")[-2:] == ["-e .", ""]


def test_every_dependency_is_pinned_within_its_bounds(project, pins):
    untested = {"wandb"}  # needs an account
    for requirement in all_requirements(project):
        name = canonicalize_name(requirement.name)
        if name not in untested:
            assert name in pins, f"{name} is missing in constraints.txt"
            assert requirement.specifier.contains(pins[name]), f"{requirement} does not allow the pinned {pins[name]}"


@pytest.mark.timeout(600)
def test_an_installed_torch_stays(tmp_path, repo_root, project):
    python = fresh_environment(tmp_path / "env")
    install_fake_torch(tmp_path / "env")
    skip_without_index(python)
    checkout = tmp_path / "checkout"
    (checkout / "src" / "pixtune").mkdir(parents=True)
    for name in ("pyproject.toml", "requirements.txt", "LICENSE", "src/pixtune/__init__.py"):
        shutil.copy(repo_root / name, checkout / name)
    (checkout / "README.md").write_text("pixtune\n", encoding="utf-8")

    report = tmp_path / "report.json"
    result = pip(python, "install", "--dry-run", "--report", report, "-r", "requirements.txt", cwd=checkout)

    assert result.returncode == 0, result.stderr
    chosen = {
        canonicalize_name(item["metadata"]["name"]): item["metadata"]["version"]
        for item in json.loads(report.read_text(encoding="utf-8"))["install"]
    }
    wanted = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    assert wanted | {"pixtune"} <= set(chosen), "not everything would be installed"
    assert "torch" not in chosen, f"torch {CUSTOM_TORCH} would be replaced by {chosen[canonicalize_name('torch')]}"
    assert not [name for name in chosen if name.startswith(("nvidia-", "cuda-", "triton"))], "what only torch needs"


def fresh_environment(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def install_fake_torch(environment: Path) -> None:
    """What pip sees of an installed torch: its dist-info folder, with needs of its own."""
    (site_packages,) = environment.glob("**/site-packages")
    dist_info = site_packages / f"torch-{CUSTOM_TORCH}.dist-info"
    dist_info.mkdir()
    needs = "".join(f"Requires-Dist: {name}\n" for name in ("filelock", "sympy>=1.13.3", "jinja2", "fsspec>=0.8.5"))
    (dist_info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {CUSTOM_TORCH}\n{needs}")
    (dist_info / "INSTALLER").write_text("pip\n")
    (dist_info / "RECORD").write_text("")


def skip_without_index(python: Path) -> None:
    result = pip(python, "download", "--no-deps", "--dest", python.parent, "setuptools>=77", timeout=60)
    if result.returncode != 0:
        pytest.skip(f"the package index cannot be reached: {result.stderr.strip().splitlines()[-1]}")


def pip(
    python: Path, *words: object, cwd: Path | None = None, timeout: float = 500
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "1"]
    return subprocess.run(
        [*command, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )
