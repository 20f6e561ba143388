"""Hostile files and models, made by a seed, and what each command does with them: `make hostile`.

`python -m tests.hostile --help` names the options. Every case runs as the command line that a user types, in a process
of its own with bounds of time and memory; a sample of them is part of the suite (`tests/faults/test_hostile.py`). What
is promised stands in `docs/security.md`.
"""
