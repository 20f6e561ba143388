"""For all tests: nothing reaches a network, and tests marked `gpu` are skipped where there is no CUDA GPU."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before any test imports a library that reads them.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", WANDB_MODE="disabled", TOKENIZERS_PARALLELISM="false"
)


# The same examples in each run, so that a failure is the change's and nothing has to be kept; machines differ in speed.
settings.register_profile(
    "suite",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")


os.fsync = lambda fd: None  # no test cuts the power; a fiftieth of a second each, twenty times a run

LONGEST = (
    "test_key_effects", "test_compile", "test_quantized_training", "test_stop", "test_model_check", "test_lora",
    "test_activations", "test_full_fine_tuning", "test_sample", "test_two_processes", "test_modulation",
    "test_commands", "test_stock_lora", "test_edit_parity", "test_kill_and_resume", "test_browser", "test_install",
    "test_services", "test_hostile", "test_out_of_memory", "test_padded_text", "test_all_weights_together",
    "test_suite_commands", "test_quantized_gradients", "test_adapter_runs", "test_changed_pictures", "test_streaming",
    "test_optimizers", "test_losses", "test_phases", "test_learning", "test_benchmarks", "test_suspects",
    "test_divided_encoding", "test_footprint", "test_attention_trial", "test_sampler",
)  # fmt: skip
"""Files that take the longest, in that order: where processes take file after file, none of these should come last."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


NUM_FROZEN = pytest.StashKey[int]()
"""Modules that were imported when what is in memory was last frozen."""
MANY_MODULES = 200


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """What libraries keep in memory is no garbage: a million objects, which each collection would walk through.

    A run collects before it makes room, so that took a quarter of the time of tests that train. After a test there is
    nothing else but what fixtures of its module hold.
    """
    if len(sys.modules) > item.config.stash.get(NUM_FROZEN, 0) + MANY_MODULES:
        gc.collect()
        gc.freeze()
        item.config.stash[NUM_FROZEN] = len(sys.modules)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def warm_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encodings that runs share whose tests are not about encoding: named by content, so nobody gets another's."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "warm_cache"  # all processes have one
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory, warm_cache: Path) -> Path:
    """The folder of a finished run (`tests/recorded.py`); not to be changed."""
    from tests.recorded import record

    return record(tmp_path_factory.mktemp("recorded"), warm_cache)


@pytest.fixture
def copy(recorded: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of the recorded run under a name."""

    def make(name: str = "run") -> Path:
        return Path(shutil.copytree(recorded, tmp_path / name))

    return make


@pytest.fixture
def diffusers_warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """diffusers says in warnings which keys were missing, unexpected or ignored."""
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING, logger="diffusers"):
        yield caplog
    diffusers_logging.disable_propagation()


@pytest.fixture
def own_graphs() -> Iterator[None]:
    """Nothing that was compiled before serves the test, and what `compile_blocks` sets ends with it."""
    import torch
    import torch._functorch.config as functorch_config
    from torch._inductor import config as inductor_config

    from pixtune.engine.compile import LIMIT_TO_KNOWN_OPERATORS, LIMITS_TO_RECOMPUTING

    names = (*LIMITS_TO_RECOMPUTING, LIMIT_TO_KNOWN_OPERATORS)
    before = {name: getattr(functorch_config, name) for name in names}
    shape_padding = inductor_config.shape_padding
    torch._dynamo.reset()
    yield
    for name, value in before.items():
        setattr(functorch_config, name, value)
    inductor_config.joint_custom_pre_pass = None
    inductor_config.shape_padding = shape_padding
    torch._dynamo.reset()
