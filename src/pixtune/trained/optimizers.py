"""Builds the optimizers of `plan.optimizers.OPTIMIZERS`, each by the function of its name."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from pixtune.config.schema import TrainConfig
from pixtune.errors import ConfigError
from pixtune.plan.optimizers import OPTIMIZERS, TrainedTensors, has_8bit_states, is_orthogonalized
from pixtune.trained.adamw_8bit import WithoutWaiting, import_bitsandbytes
from pixtune.trained.of_libraries import InGroups, Waiting
from pixtune.trained.optim import Optimizer
from pixtune.trained.prodigy import Prodigy

Parameters = Iterable[nn.Parameter]


def _adamw(parameters: Parameters, **settings: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, fused=True, **settings)


def _adamw_8bit(parameters: Parameters, **settings: Any) -> Optimizer:
    return WithoutWaiting(import_bitsandbytes().optim.AdamW8bit(parameters, **settings))


def _adamw_schedule_free(parameters: Parameters, **settings: Any) -> Optimizer:
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise _missing("adamw_schedule_free", "schedulefree", error) from error

    def build(group: Any) -> Any:
        optimizer = AdamWScheduleFree(group, **settings)
        optimizer.train()
        return optimizer

    return InGroups(parameters, build, kept=("k", "weight_sum", "lr_max"))


def _prodigy_schedule_free(parameters: Parameters, **settings: Any) -> Optimizer:
    try:
        from prodigyplus import ProdigyPlusScheduleFree
    except ImportError as error:
        raise _missing("prodigy_schedule_free", "prodigy-plus-schedule-free", error) from error
    inner = ProdigyPlusScheduleFree(parameters, split_groups=False, **settings)

    def complete(parameter: nn.Parameter, state: dict[str, Any]) -> None:
        # Which side a factor belongs to follows from the shape, and is not in a checkpoint.
        if "exp_avg_sq_row" in state:
            shorter, longer = inner.factored_dims(parameter.shape, factored=True, min_dim_size_to_factor=32)
            state["exp_avg_sq_metadata"] = (longer, shorter)

    kept = ("d", "d_prev", "d_numerator", "prev_d_numerator", "max_d_numerator", "d_denom", "k", "weight_sum")
    return Waiting(inner, kept, complete)


def _adafactor(parameters: Parameters, **settings: Any) -> Optimizer:
    from transformers.optimization import Adafactor

    settings.pop("betas", None)
    settings["eps"] = (1e-30, 1e-3)  # the library's own: the second is of a scaling that is off
    # By a rate of its own, it would read the size of the weights from the device.
    build = partial(Adafactor, scale_parameter=False, relative_step=False, **settings)
    return InGroups(parameters, build)


def _muon(
    parameters: Parameters,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    in_block: bool = True,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    **settings: Any,
) -> Optimizer:
    own = list(parameters)
    if not all(is_orthogonalized(TrainedTensors(tuple(weight.shape), in_block=in_block)) for weight in own):
        return _adamw(own, betas=betas, eps=eps, **settings)
    # So scaled, its steps are as large as AdamW's, and learning rate and weight decay mean the same for all weights.
    build = partial(
        torch.optim.Muon, adjust_lr_fn="match_rms_adamw", momentum=momentum, nesterov=nesterov, ns_steps=ns_steps,
        **settings,
    )  # fmt: skip
    return InGroups(own, build)


BUILDERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _adamw_8bit,
    "adamw_schedule_free": _adamw_schedule_free,
    "prodigy": Prodigy,
    "prodigy_schedule_free": _prodigy_schedule_free,
    "adafactor": _adafactor,
    "muon": _muon,
}
"""Builders of the optimizers in `plan.optimizers.OPTIMIZERS`, under the same names."""


def check_optimizer(name: str) -> None:
    """Checks that an optimizer's package is there, before weights are loaded, which takes minutes.

    Raises:
        ConfigError: a package is missing.
    """
    if OPTIMIZERS[name].package is not None:  # building one, for a single number, imports it
        BUILDERS[name]([nn.Parameter(torch.zeros(1))], lr=1.0)


def build_optimizer(
    config: TrainConfig,
    name: str,
    parameters: Parameters,
    in_block: bool = True,
    whole: TrainedTensors | None = None,
) -> Optimizer:
    """Builds the optimizer of a run (AdamW: Loshchilov and Hutter 2017, arXiv 1711.05101, algorithm 2).

    Args:
        in_block: the parameters belong to the transformer's blocks.
        whole: the tensor that the parameters are a part of, which decides what kind of states they have. None: they
            are whole.
    """
    if whole is not None and name == "adamw_8bit":
        least = 0 if has_8bit_states(whole) else sys.maxsize
        return BUILDERS[name](parameters, **_common_settings(config), min_8bit_size=least)
    return BUILDERS[name](parameters, **_common_settings(config), **_own_settings(config, name, in_block))


def _common_settings(config: TrainConfig) -> dict[str, Any]:
    return {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }


def _own_settings(config: TrainConfig, name: str, in_block: bool) -> dict[str, Any]:
    """Returns the settings of an optimizer's own section, by its library's names."""
    prodigy, adafactor, muon = config.prodigy, config.adafactor, config.muon
    if name == "prodigy":
        warms_up = config.lr_warmup_steps > 0 or config.lr_warmup_share > 0
        return {
            "d0": prodigy.d0,
            "d_coef": prodigy.d_coef,
            "growth_rate": prodigy.growth_rate or math.inf,
            "slice_p": prodigy.slice,
            "safeguard_warmup": warms_up if prodigy.safeguard_warmup is None else prodigy.safeguard_warmup,
            "use_bias_correction": prodigy.bias_correction,
        }
    own: dict[str, dict[str, Any]] = {
        "prodigy_schedule_free": {"d0": prodigy.d0, "d_coef": prodigy.d_coef},
        "adamw_schedule_free": {"r": config.schedule_free.r, "weight_lr_power": config.schedule_free.weight_lr_power},
        "adafactor": {
            "beta1": adafactor.momentum,
            "decay_rate": adafactor.decay_rate,
            "clip_threshold": adafactor.clip_threshold,
        },
        "muon": {
            "momentum": muon.momentum, "nesterov": muon.nesterov, "ns_steps": muon.ns_steps, "in_block": in_block,
        },
    }  # fmt: skip
    return own.get(name, {})


def _missing(name: str, package: str, error: ImportError) -> ConfigError:
    return ConfigError(
        f'optimizer is "{name}"',
        [f"It needs the package {package}, which cannot be imported ({error}). Run `pip install {package}`."],
    )
