"""The exchange at a step's end: what is known of one that fails."""

from __future__ import annotations

import pytest
import torch

from pixtune.engine.exchange import Exchange


def test_an_exchange_counts_from_where_the_others_are_needed() -> None:
    """Memory that is missing before is this process's own trouble; afterwards the others have gone on."""

    def lack(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    before, within = Exchange(lambda totals_2: None, lack), Exchange(lack)
    for exchange, begun in ((before, 0), (within, 1)):
        with pytest.raises(torch.OutOfMemoryError):
            exchange(torch.zeros(2))
        assert exchange.num_begun == begun
