"""Runs everything around the steps: figures, held-out loss, samples, checkpoints, and the files at the end.

`around_steps` has the calls that the loop makes. What is done between steps is a `Look` (looks.py), an object of its
own that knows when it is due; `Services` calls each in order. `session` holds what they all use.

Every service reads weights and changes none, and every random draw has its own key, so that a service that is switched
on changes no bit of the training. Saving comes first, and is the only one whose failure ends a run: see
`tracking/problems.py`. What a run that was killed after a checkpoint had still to measure or draw there is made up for.
"""

from pixtune.services.around_steps import Services

__all__ = ["Services"]
