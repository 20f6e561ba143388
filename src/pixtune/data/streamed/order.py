"""The order of a stream's turns: `BatchOrder`'s calls, over windows that are read and encoded when a turn needs them.

What meets in a micro-batch is a function of the seed and the stream, whoever asks for which micro-batch when. It is
asked for in one thread, in all processes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Protocol, overload

from pixtune.config.schema import TrainConfig
from pixtune.data.example_table import Example
from pixtune.data.order import Turn, Use
from pixtune.data.streamed.position import has_ended
from pixtune.data.streamed.reading import ReadRows
from pixtune.data.streamed.state import FILE, TENSOR, Counts, StreamState, to_tensor
from pixtune.data.streamed.windows import StreamRow, Window, cut_batches, in_random_order, mixed
from pixtune.errors import DataError
from pixtune.plan.training import TrainingPlan
from pixtune.storage.safetensors_writer import TensorFile


class Rows(Protocol):
    """Source of a stream's rows, and of their encodings."""

    @property
    def num_shards(self) -> int: ...

    def read(self, state: StreamState) -> ReadRows:
        """Reads the rows of the window after a state."""

    def example_of(self, row: StreamRow) -> Example:
        """Frames a row as its epoch uses it: with one framing and one caption."""

    def count(self, counts: Counts, problems: Sequence[str]) -> None:
        """Learns how many rows were read and skipped; raises where they are too many."""

    def encode(self, rows: Sequence[tuple[StreamRow, Example]]) -> None:
        """Has the encodings of all these examples in the cache when it returns."""


class Same(Sequence[Use]):
    """One way of use for all examples, whatever their numbers are."""

    def __init__(self, use: Use) -> None:
        self._use = use

    def __len__(self) -> int:
        return 1

    @overload
    def __getitem__(self, number: int) -> Use: ...

    @overload
    def __getitem__(self, number: slice) -> list[Use]: ...

    def __getitem__(self, number: int | slice) -> Use | list[Use]:
        return [self._use] if isinstance(number, slice) else self._use


class Names(Sequence[str]):
    """Names of the examples that are there now, by their numbers in the run; as a sequence it is empty."""

    def __init__(self, examples: Mapping[int, Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return 0

    @overload
    def __getitem__(self, number: int) -> str: ...

    @overload
    def __getitem__(self, number: slice) -> list[str]: ...

    def __getitem__(self, number: int | slice) -> str | list[str]:
        return [] if isinstance(number, slice) else self._examples[number].name


@dataclass
class StreamOrder:
    """The turns of a streamed run, in order.

    Args:
        kept_back: number of micro-batches before the newest one asked for that may be asked for again.
    """

    seed: int
    global_batch_size: int
    supply: Rows
    state: StreamState
    use: Use
    kept_back: int = 2
    lookback: int = 0
    """Number of micro-batches before a checkpoint's that a resumed run asks for again."""
    make_room: Callable[[], object] = lambda: None
    """Frees device memory before a window is encoded between steps."""
    examples: dict[int, Example] = field(default_factory=dict)
    """Examples of the state's rows, by their numbers in the run."""

    def __post_init__(self) -> None:
        self.examples.update((number, self.supply.example_of(row)) for number, row in self.state.rows.items())

    @property
    def uses(self) -> Same:
        return Same(self.use)

    @property
    def an_example(self) -> int:
        """Number of some example that is there, for what needs any."""
        return min(self.examples)

    @property
    def names(self) -> Names:
        return Names(self.examples)

    def micro_batch(self, index: int) -> list[Turn]:
        """Returns the turns of global micro-batch `index` of the run, and has their window encoded.

        Raises:
            DataError: the stream cannot be read, or too many of its rows cannot be used.
        """
        while index >= self.state.end:
            self.extend()
        window = next((each for each in self.state.windows if each.first <= index < each.end), None)
        if window is None:
            raise AssertionError(f"micro-batch {index} is of a window that was dropped")
        return [Turn(number, 0) for number in window.batches[index - window.first]]

    def extend(self) -> None:
        """Reads and encodes the next window. Where it raises, nothing has changed.

        Raises:
            DataError: as `micro_batch`.
        """
        state, num_rows, num_ends = self.state, 0, 0
        while state.end == self.state.end:
            read = self.supply.read(state)
            num_rows += len(read.rows)
            counts = Counts(
                state.counts.read + read.num_read,
                state.counts.skipped + len(read.problems),
                state.counts.copies + read.num_copies,
            )
            self.supply.count(counts, read.problems)
            num_ends += has_ended(read.position, self.supply.num_shards)
            if not num_rows and num_ends == 2:  # the first may be that of an epoch whose rows were all read before
                raise DataError("nothing is left to train on", ["No row of the stream can be used."])
            numbered = dict(enumerate(in_random_order(read.rows, self.seed), state.next_row))
            self.examples.update((number, self.supply.example_of(row)) for number, row in numbered.items())
            state = self._with_rows(state, read, counts, numbered)
        state = self._pruned(state)
        self.make_room()
        self._encode(state)
        self.state = state
        for number in self.examples.keys() - state.rows.keys():
            del self.examples[number]

    def keep_for(self, config: TrainConfig, plan: TrainingPlan, make_room: Callable[[], object]) -> None:
        """Keeps the windows that a run asks for again, by its plan: of steps whose batches wait, and of stretches of a
        modulation table, which begin before the step that a checkpoint is of."""
        accumulation = config.gradient_accumulation_steps
        self.make_room = make_room
        self.lookback = accumulation * plan.modulation_rows
        # Batches that threads have asked for wait, and a step that fails is saved as not taken, however far it was.
        self.kept_back = 3 * self.lookback + 2 * config.data_config.num_workers + 2 * accumulation

    def encode_again(self) -> None:
        """Has the encodings of the state's rows in the cache: some may be gone since its checkpoint was written."""
        self._encode(self.state)

    def _encode(self, state: StreamState) -> None:
        self.supply.encode([(row, self.examples[number]) for number, row in state.rows.items()])

    def _with_rows(
        self,
        state: StreamState,
        read: ReadRows,
        counts: Counts,
        numbered: Mapping[int, StreamRow],
    ) -> StreamState:
        waiting = [(number, self.examples[number].signature(0)) for number in (*state.waiting, *numbered)]
        batches, left = cut_batches(waiting, self.global_batch_size)
        number = read.position.window - 1
        window = Window(number, state.end, mixed(batches, self.seed, number))
        return replace(
            state,
            position=read.position,
            windows=(*state.windows, window) if batches else state.windows,
            rows={**state.rows, **numbered},
            waiting=tuple(number for number, _ in left),
            next_row=state.next_row + len(numbered),
            end=window.end,
            counts=counts,
        )

    def _pruned(self, state: StreamState, first: int | None = None) -> StreamState:
        """Returns a state without the windows that end before a micro-batch."""
        first = self.state.end - self.kept_back if first is None else first
        windows = tuple(window for window in state.windows if window.end > first)
        kept = {*state.waiting, *chain.from_iterable(batch for window in windows for batch in window.batches)}
        rows = {number: row for number, row in state.rows.items() if number in kept}
        return replace(state, windows=windows, rows=rows)

    def files(self, index: int) -> dict[str, TensorFile]:
        """Returns the file of a checkpoint from which the run goes on with micro-batch `index`."""
        state = self._pruned(self.state, max(0, index - self.lookback))
        return {FILE: TensorFile({TENSOR: to_tensor(state)})}
