"""Processes of a run: how they are started, how they are told to stop, and how they notice that one of them is gone.

Begin with `stop.py`. `accelerator.py` starts the process group, `launcher.py` finds the program that started this
process, and `peers.py` connects the processes of one run.
"""
