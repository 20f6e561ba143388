"""The weights that are trained, their optimizers, and the files that others load. `methods.py` is the entry."""
