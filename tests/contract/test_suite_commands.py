"""contract.md C9: the commands that run tests. `pytest` itself is what runs this."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

from tests.runs import ROOT, environment, run

SELECTION = ["-k", "presets", "-p", "no:cacheprovider"]
"""A test of the file that takes no time, so that the commands stand here as they are typed and end soon."""


def own_environment(folder: Path) -> dict[str, str]:
    """Nothing of an outer run of pytest or coverage reaches the inner one."""
    outer = ("COV_", "COVERAGE", "PYTEST")
    kept = {name: value for name, value in environment().items() if not name.startswith(outer)}
    return {**kept, "COVERAGE_FILE": str(folder / "coverage")}


def test_c9_pytest_collects_the_tests_folder() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert settings["testpaths"] == ["tests"] and (ROOT / "tests" / "test_unified_memory.py").is_file()
    assert settings["pythonpath"] == ["."], "so that utils and image_datasets can be imported"


def test_c9_the_unified_memory_tests_stand_at_their_path(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "tests/test_unified_memory.py", "-v", *SELECTION]
    outcome = run(command, env=own_environment(tmp_path))
    assert outcome.returncode == 0, outcome.stdout
    assert "tests/test_unified_memory.py::test_the_presets_are_the_documents PASSED" in outcome.stdout


def test_c9_coverage_of_utils_counts_the_modules_behind_it(tmp_path: Path) -> None:
    report = tmp_path / "coverage.json"
    command = [sys.executable, "-m", "pytest", "--cov=utils", f"--cov-report=json:{report}", *SELECTION]
    outcome = run([*command, "tests/test_unified_memory.py"], env=own_environment(tmp_path))
    assert outcome.returncode == 0, outcome.stdout
    files = json.loads(report.read_text(encoding="utf-8"))["files"]
    covered = {path: figures["summary"]["covered_lines"] for path, figures in files.items()}
    assert covered["utils/unified_memory.py"] and covered["src/pixtune/hardware/unified.py"]
    assert "src/pixtune/hardware/features.py" in covered, "a module that no test imports counts as not covered"
