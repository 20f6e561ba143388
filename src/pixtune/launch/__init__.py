"""Processes of a run: how they are started, how they are told to stop, and how they notice that one of them is gone.

Begin with `stop.py`. `accelerator.py` starts the process group, `launcher.py` finds the program that started this
process, `joining.py` connects the processes of one run, `peers.py` is how they see each other, and `agreement.py`
compares what they were started with.
"""
