"""Steps all weights of a transformer one after the other in fp32, so that small updates reach bf16 weights.

A bf16 number has 8 significant bits, so an update below 1/512 of a weight is lost when it is rounded to the nearest.
Either the update goes to an fp32 copy (`fp32_master`), or the sum is rounded up or down with a chance in proportion to
its distance, so that it is right on average (`stochastic_rounding`; Gupta et al. 2015, arXiv 1502.02551, section 3).

One weight at a time is held in fp32, so the cost in memory is that of the largest one, and each may be stepped as soon
as its gradient is there.

Where processes hold the weights together (`engine/sharding.py`), each steps its own rows. What rounding draws for a
number depends on its place in the whole weight, so that as many processes as you like round alike.

AdamW's step is one kernel on a GPU (`adamw_step.py`). Elsewhere, and for other optimizers, a stand-in for the weight is
stepped in fp32 by the optimizer itself, and then rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pixtune import randomness
from pixtune.engine.rounding import Draw, round_into, round_stochastically
from pixtune.engine.sharding import Rows, local_of, rows_of
from pixtune.engine.streaming import BlockStream
from pixtune.engine.together import Together
from pixtune.plan.optimizers import KERNEL, SEPARATE
from pixtune.trained import optim
from pixtune.trained.adamw_step import Prepared, StepOfAll, WeightMemory, can_step, prepare, step_adamw
from pixtune.trained.host_states import HostStates
from pixtune.trained.skipped_step import step_unless

MASTER = "fp32 copy"
"""Name of a weight's fp32 copy among its tensors in host memory; no optimizer has a state of that name."""


def draw_for_all_rows(generator: torch.Generator, rows: Rows, device: torch.device) -> Tensor:
    """Draws 16 bits for each number of a whole weight from a torch generator; returns those of some rows."""
    return rows.of(torch.randint(0, 1 << 16, rows.shape, generator=generator, device=device, dtype=torch.int32))


class WeightUpdate:
    """An optimizer over all weights, of which each is stepped by itself.

    Args:
        build: builds the optimizer of the weight of a name, over a stand-in of as many dimensions.
        first_step: number of steps already done, from which a resumed run continues its draws.
        keeps_masters: whether bf16 weights have fp32 copies; if not, they are rounded by chance.
        host: holds optimizer states and fp32 copies between steps; None: they stay on the device.
        together: processes that hold the weights together; None: this one holds all.
        form: how weights are stepped, one of `plan.optimizers.STEP_FORMS`; None: as runs did that do not know it.
        stream: brings blocks whose weights wait in host memory; each is stepped while its block runs backward.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        build: Callable[[str, Iterable[nn.Parameter]], optim.Optimizer],
        seed: int,
        first_step: int,
        keeps_masters: bool = False,
        host: HostStates | None = None,
        together: Together | None = None,
        form: str | None = SEPARATE,
        stream: BlockStream | None = None,
    ) -> None:
        self.weights, self._seed, self._steps_done, self._host = weights, seed, first_step, host
        self._stream = stream
        self._is_torn = False
        self._step_of_all = StepOfAll()
        self._keeps_masters, self._form = keeps_masters, form
        self._rows = {name: rows_of(weight, together or Together()) for name, weight in weights.items()}
        self._masters: dict[str, Tensor] = {}
        """fp32 copies, each made when its weight is stepped for the first time: until then the weight is the copy."""
        self._stand_ins = {name: nn.Parameter(_nothing(weight)) for name, weight in weights.items()}
        self._optimizers = {name: build(name, [stand_in]) for name, stand_in in self._stand_ins.items()}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers.values() for group in optimizer.param_groups]

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Any]]:
        """State of each weight: the very dictionaries that the optimizers read and write, host memory included."""
        if self._host is not None:
            self._host.finish()
        return {weight: self._state_of(name) for name, weight in self.weights.items()}

    @property
    def is_torn(self) -> bool:
        """Whether a step was begun, has changed some weights and has not ended."""
        return self._is_torn

    def begin_step(self) -> None:
        """Begins to fetch what waits in host memory."""
        if self._host is not None:
            self._host.begin_step()

    def end_step(self) -> None:
        """Counts the step: the next draws for rounding are another step's."""
        self._steps_done += 1
        self._is_torn = False
        if self._stream is not None:
            self._stream.settle_changes()

    @torch.no_grad()
    def step_weight(self, name: str, gradient: Tensor, factor: Tensor | None, spoiled: Tensor) -> None:
        """Steps one weight by its gradient times the factor. The caller drops the gradient afterwards.

        Args:
            spoiled: 1 on the device where weight and states have to stay as they are, else 0.
        """
        weight = local_of(self.weights[name])
        self._is_torn = True
        if not weight.numel():
            return  # of a weight with fewer rows than there are processes
        if self._host is not None:
            self._arrange(name, self._host.fetch(name))
        if self._form == KERNEL and can_step(self._optimizers[name], weight):
            step_adamw(self._prepare(name, weight, gradient, spoiled), factor, spoiled)
        else:
            self._step_separately(name, weight, gradient, factor, spoiled)
        if self._host is not None:
            self._arrange(name, self._host.rest(name, self._tensors_of(name)))
        if self._stream is not None:
            self._stream.changed(self.weights[name])

    @torch.no_grad()
    def step_weights(self, gradients: Mapping[str, Tensor], factor: Tensor | None, spoiled: Tensor) -> None:
        """Steps all weights that have a gradient, at once where one kernel can; see `step_weight`."""
        at_once: list[Prepared] = []
        for name, gradient in gradients.items():
            weight = local_of(self.weights[name])
            takes_kernel = self._form == KERNEL and self._host is None and weight.numel() > 0
            if takes_kernel and can_step(self._optimizers[name], weight):
                at_once.append(self._prepare(name, weight, gradient, spoiled))
            else:
                self.step_weight(name, gradient, factor, spoiled)
        if at_once:
            self._is_torn = True
            self._step_of_all.step(at_once, factor, spoiled)

    def truest(self, name: str) -> Tensor:
        """Returns this process's rows of a weight in their truest form: the fp32 copy where weights have one."""
        if self._host is not None:
            self._host.finish()
        if self._keeps_masters and name in self._masters:
            return self._masters[name]
        weight = self.held(name)
        return weight.float() if self._keeps_masters else weight

    def held(self, name: str) -> Tensor:
        """Returns this process's rows of a weight where they are between steps, which may be host memory."""
        weight = self.weights[name]
        at_home = None if self._stream is None else self._stream.at_home(weight)
        if at_home is None:
            return local_of(weight).detach()
        if weight.device.type == "cuda":
            torch.cuda.synchronize(weight.device)  # what the last step changed may still be on its way
        return at_home

    def rows(self, name: str) -> Rows:
        """Returns which rows of a weight, its states and its fp32 copy this process holds."""
        return self._rows[name]

    @torch.no_grad()
    def restore(self, name: str, value: Tensor, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Puts back this process's rows of a weight, and their optimizer state, from a checkpoint.

        Args:
            value: the rows as `truest` returned them.
            tensors: its optimizer state by `NAME/KEY`, as `optim.optimizer_state` returned it.
            plain: the values of that state that are no tensors.
        """
        weight = local_of(self.weights[name])
        if self._stream is not None and self._stream.at_home(self.weights[name]) is not None:
            self._stream.replace(self.weights[name], value)
        else:
            weight.copy_(value)
        if not weight.numel():
            return
        if self._keeps_masters:
            self._masters[name] = value.to(weight.device, torch.float32, copy=True)
        state = {self.weights[name]: self._state_of(name)}
        optim.restore_optimizer_state(state, {name: self.weights[name]}, tensors, {name: plain} if plain else {})
        if self._host is not None:
            self._arrange(name, self._host.rest(name, self._tensors_of(name)))

    # ---- inside

    def _state_of(self, name: str) -> dict[str, Any]:
        return self._optimizers[name].state[self._stand_ins[name]]

    def _tensors_of(self, name: str) -> dict[str, Tensor]:
        found = {key: value for key, value in self._state_of(name).items() if isinstance(value, Tensor)}
        return found | ({MASTER: self._masters[name]} if name in self._masters else {})

    def _arrange(self, name: str, moved: Mapping[str, Tensor]) -> None:
        """Stores tensors that moved where the optimizer and this class look for them."""
        state = self._state_of(name)
        for key, tensor in moved.items():
            if key == MASTER:
                self._masters[name] = tensor
            else:
                state[key] = tensor

    def _prepare(self, name: str, weight: Tensor, gradient: Tensor, spoiled: Tensor) -> Prepared:
        master = self._precise(name) if self._keeps_masters and weight.dtype != torch.float32 else None
        draw = self._draw(name) if master is None and weight.dtype != torch.float32 else None
        memory = WeightMemory(weight.detach(), master, draw)
        return prepare(self._optimizers[name], self._stand_ins[name], memory, gradient, spoiled)

    def _precise(self, name: str) -> Tensor:
        """Returns the weight in fp32 for the optimizer to change: itself, its fp32 copy, or a copy for this step."""
        weight = local_of(self.weights[name]).detach()
        if not self._keeps_masters:
            return weight.float()
        if name not in self._masters:
            self._masters[name] = weight.float()
        return self._masters[name]

    def _step_separately(
        self, name: str, weight: Tensor, gradient: Tensor, factor: Tensor | None, spoiled: Tensor
    ) -> None:
        """Steps a weight's stand-in in fp32, and writes the result back."""
        stand_in = self._stand_ins[name]
        stand_in.data = self._precise(name)
        scaled = gradient.float()
        if factor is not None:
            scaled = scaled * factor if scaled is gradient else scaled.mul_(factor)
        stand_in.grad = scaled
        step_unless(self._optimizers[name], spoiled)
        stand_in.grad = None
        self._write_back(name, weight, stand_in.data)
        stand_in.data = _nothing(weight)

    def _write_back(self, name: str, weight: Tensor, precise: Tensor) -> None:
        if weight.dtype == torch.float32:
            return  # the optimizer changed the weight itself
        if self._keeps_masters:
            weight.copy_(precise)
        elif self._form is None:
            generator = torch.Generator(weight.device)
            generator.manual_seed(self._draw(name).key)
            noise = draw_for_all_rows(generator, self._rows[name], weight.device)
            weight.copy_(round_stochastically(precise, noise))
        else:
            round_into(weight, precise, self._draw(name))

    def _draw(self, name: str) -> Draw:
        rows = self._rows[name]
        key = randomness.draw_key(self._seed, "rounding", self._steps_done, name)
        return Draw(key, rows.start * rows.row_numbers)


def _nothing(weight: Tensor) -> Tensor:
    return torch.empty((0,) * weight.dim(), dtype=torch.float32, device=weight.device)
