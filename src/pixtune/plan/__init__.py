"""Decides what fits: pure functions of facts, sizes and demands that return plans with reasons. Imports no torch.

`training.py` is the entry for a run, `sampling.py` for `pixtune sample`, `encoders.py` for the encoders.
"""
