"""Measures pictures with fixed noise between steps, within the memory that a step has."""

from __future__ import annotations

from collections.abc import Sequence

from pixtune.engine.relief import first_that_fits
from pixtune.judging.validation import NUM_QUARTERS, HeldOutPicture, ValidationLoss, measure
from pixtune.services.session import Session


def measure_pictures(session: Session, pictures: Sequence[HeldOutPicture], name: str) -> ValidationLoss:
    """Measures the loss of pictures with what the run has learned; one by one where memory is short.

    Args:
        name: name of the measurement in messages, such as "the held-out loss".
    """
    run, config = session.run, session.config
    num_draws = config.validation.num_draws
    num_passes = len(pictures) * -(-NUM_QUARTERS * num_draws // config.batch_size)
    in_place = run.trained.result_in_place(in_training=True)
    with in_place, session.aside(name.removeprefix("the "), num_passes) as after_pass:

        def measured(batch_size: int) -> ValidationLoss:
            return measure(
                run.family, run.transformer, pictures, num_draws, config.seed, run.accelerator.device,
                config.objective.guidance, batch_size, after_pass,
            )  # fmt: skip

        def one_by_one() -> ValidationLoss:
            run.forward_backward.release()
            return measured(batch_size=1)

        return first_that_fits([lambda: measured(config.batch_size), one_by_one], name)
