"""Keeps optimizer states in page-locked host memory; each weight's visit the device while that weight is stepped.

In each step a weight's state is fetched before and sent back after, each on a lane of its own, since a link carries
both directions at once. All of a weight's tensors lie side by side in host memory, so that a visit is one copy. On the
device they lie in a ring of bytes: weights are stepped in the same order every time, so the next ones are fetched while
their gradients are still being computed, as far as the ring has room.

Only `finish` and the first visit of each weight make the host wait. Marks order the copies: a span of the ring is
filled again once its last guest has been sent back, and a guest is fetched again once it has arrived.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pixtune.engine.transfer import CopyLane, Mark, host_buffer
from pixtune.plan.all_weights import AHEAD_BYTES, LEAST_HOST_TENSOR_BYTES

ALIGNMENT_BYTES = 256
"""Alignment of every tensor, that of the device's own allocator."""
CHUNK_BYTES = 2**30
"""Size of the pieces in which host memory is taken and locked: small ones share pages, which cannot be locked twice."""


@dataclass(frozen=True)
class Place:
    """Place of one tensor within its weight's bytes."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype
    num_bytes: int

    def view(self, memory: Tensor) -> Tensor:
        return memory[self.offset : self.offset + self.num_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Sent:
    """End of a copy to the host. Copies of one lane end in order, so a later number implies the earlier ones."""

    number: int = 0
    mark: Mark = None


@dataclass
class Resident:
    """Large tensors of one weight, in host memory."""

    host: Tensor
    places: Mapping[str, Place]
    sent: Sent = Sent()
    """Copy after which host memory has the newest values."""

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """Returns the tensors as views of bytes that are laid out as those in host memory."""
        return {key: place.view(memory) for key, place in self.places.items()}


@dataclass
class Chunk:
    """Page-locked memory that is given away piece by piece. It is locked as long as its own tensor lives."""

    memory: Tensor
    used_bytes: int = 0

    @property
    def room_bytes(self) -> int:
        return self.memory.numel() - self.used_bytes

    def take(self, num_bytes: int) -> Tensor:
        start, self.used_bytes = self.used_bytes, self.used_bytes + num_bytes
        return self.memory[start : self.used_bytes]


@dataclass
class Guest:
    """Tensors of one weight on the device, in a span of the ring."""

    start: int
    end: int
    arrived: Mark = None
    left: Sent | None = None
    """Copy back to the host, once it has been started: the span may be filled again after it."""


@dataclass
class Ring:
    """Device memory that guests fill in turn."""

    memory: Tensor
    guests: deque[Guest] = field(default_factory=deque)
    """Guests that may still be there, the oldest first."""
    next_start: int = 0

    def admit(self, num_bytes: int) -> tuple[Guest, Sent] | None:
        """Returns a span and the copy that must end before it is filled; None while a needed guest is in the way."""
        wraps = self.next_start + num_bytes > self.memory.numel()
        claimed = [(self.next_start, self.memory.numel()), (0, num_bytes)] if wraps else []
        start = 0 if wraps else self.next_start
        claimed = claimed or [(start, start + num_bytes)]
        in_the_way = []
        for guest in self.guests:
            if not any(guest.start < end and begin < guest.end for begin, end in claimed):
                break  # spans are claimed in their order, so none of the later guests is in the way
            if guest.left is None:
                return None
            in_the_way.append(guest.left)
        for _ in in_the_way:
            self.guests.popleft()
        admitted = Guest(start, start + num_bytes)
        self.guests.append(admitted)
        self.next_start = admitted.end
        return admitted, max(in_the_way, key=lambda sent: sent.number, default=Sent())

    def drop_all(self) -> None:
        """Gives up guests that were fetched in vain. Their copies end before any later one of the same lane."""
        for guest in self.guests:
            guest.left = guest.left or Sent()


class HostStates:
    """Optimizer states of all weights, which rest in host memory and visit the device.

    Args:
        ahead_bytes: size of the ring, unless the two largest guests need more or all together less.
        make_lane: builds a `CopyLane`, or a test's stand-in for one.
    """

    def __init__(
        self,
        device: torch.device,
        ahead_bytes: int = AHEAD_BYTES,
        make_lane: Callable[[torch.device], CopyLane] = CopyLane,
    ) -> None:
        self._device, self._ahead_bytes = device, ahead_bytes
        self._fetching, self._sending = make_lane(device), make_lane(device)
        self._last_sent = Sent()
        self._chunks: list[Chunk] = []
        self._residents: dict[str, Resident] = {}
        self._ring: Ring | None = None
        self._here: dict[str, Guest] = {}
        self._order: list[str] = []
        """Names of the weights, in the order of their visits in the last step."""
        self._visited: dict[str, None] = {}
        self._num_considered = 0
        """Number of weights of `_order` that fetching ahead has passed in this step."""

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that hold a state."""
        return sum(resident.host.numel() for resident in self._residents.values())

    def begin_step(self) -> None:
        """Begins the visits of another step, and fetches the first states."""
        self._order, self._visited, self._num_considered = list(self._visited) or self._order, {}, 0
        self._fetch_ahead()

    def fetch(self, name: str) -> dict[str, Tensor]:
        """Returns a weight's tensors on the device, to change in place and hand to `rest`; empty if it has none."""
        self._visited[name] = None
        if name not in self._residents:
            return {}
        guest = self._here.get(name) or self._admit(name)
        if guest is None:  # another order than the last step's: what was fetched ahead is in the way
            self._ring_of_device().drop_all()
            self._here.clear()
            guest = self._admit(name)
        assert guest is not None, "the ring is larger than any guest"
        self._fetch_ahead()
        self._fetching.wait(guest.arrived)
        memory = self._ring_of_device().memory[guest.start : guest.end]
        return self._residents[name].views(memory)

    def rest(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sends a weight's tensors back to the host, where the first call takes memory for them.

        Returns:
            The tensors in host memory. Small ones stay where they are and are not among them.
        """
        if guest := self._here.pop(name, None):
            resident = self._residents[name]
            source = self._ring_of_device().memory[guest.start : guest.end]
            mark = self._sending.copy(resident.host, source, after=self._sending.reached())
            self._last_sent = resident.sent = guest.left = Sent(self._last_sent.number + 1, mark)
            return resident.views(resident.host)
        large = {key: tensor for key, tensor in tensors.items() if tensor.nbytes >= LEAST_HOST_TENSOR_BYTES}
        return self._settle(name, large) if large else {}

    def finish(self) -> None:
        """Waits until everything that was sent is in host memory, before it is read there."""
        self._sending.wait(self._last_sent.mark)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    # ---- inside

    def _settle(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Takes host memory for a weight's tensors and copies them there; the host waits for the copies."""
        places: dict[str, Place] = {}
        end = 0
        for key, tensor in tensors.items():
            places[key] = Place(end, tensor.shape, tensor.dtype, tensor.nbytes)
            end += -(-tensor.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        resident = self._residents[name] = Resident(self._take(end), places)
        for key, view in resident.views(resident.host).items():
            view.copy_(tensors[key])
        if self._ring is not None and 2 * end > self._ring.memory.numel():
            self.finish()
            self._ring = None  # built anew, large enough, when it is needed
            self._here.clear()
        return resident.views(resident.host)

    def _take(self, num_bytes: int) -> Tensor:
        chunk = next((chunk for chunk in self._chunks if chunk.room_bytes >= num_bytes), None)
        if chunk is None:
            chunk = Chunk(host_buffer(max(CHUNK_BYTES, num_bytes), self._device))
            self._chunks.append(chunk)
        return chunk.take(num_bytes)

    def _ring_of_device(self) -> Ring:
        if self._ring is None:
            sizes = [resident.host.numel() for resident in self._residents.values()]
            num_bytes = max(2 * max(sizes), min(sum(sizes), self._ahead_bytes))
            self._ring = Ring(torch.empty(num_bytes, dtype=torch.uint8, device=self._device))
            self.finish()  # kernels that were launched before may still use that memory
        return self._ring

    def _fetch_ahead(self) -> None:
        """Fetches as many of the next weights' states as the ring has room for."""
        while self._num_considered < len(self._order):
            name = self._order[self._num_considered]
            wanted = name in self._residents and name not in self._here and name not in self._visited
            if wanted and self._admit(name) is None:
                return
            self._num_considered += 1

    def _admit(self, name: str) -> Guest | None:
        resident, ring = self._residents[name], self._ring_of_device()
        admitted = ring.admit(resident.host.numel())
        if admitted is None:
            return None
        guest, left = admitted
        after = max(left, resident.sent, key=lambda sent: sent.number)
        guest.arrived = self._fetching.copy(ring.memory[guest.start : guest.end], resident.host, after=after.mark)
        self._here[name] = guest
        return guest
