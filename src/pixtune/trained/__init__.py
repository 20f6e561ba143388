"""The weights that are trained, their optimizers, and the files in which others load them. `methods.py` is the entry."""
