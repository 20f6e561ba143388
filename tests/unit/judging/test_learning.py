"""What a saved file must do: effects by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from pixtune.judging.learning import fault_of_file
from pixtune.trained.read_back import ReadBack


@pytest.mark.parametrize(("precision", "rates", "is_fault"), [("no", 2e-6, True), ("no", 5e-7, False),
                                                              ("bf16", 2e-3, True), ("bf16", 5e-4, False)])  # fmt: skip
def test_a_file_without_effect_is_a_fault_once_weights_moved_far_enough_to_show(
    precision: str, rates: float, is_fault: bool
) -> None:
    told = fault_of_file(ReadBack(0.0, 0.0, ()), Path("checkpoint-000001"), precision, rates)
    assert (told is not None and "does nothing" in told) == is_fault
