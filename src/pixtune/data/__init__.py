"""The way from a folder of pictures to the batches of a step. `prepare.py` is the entry, `batches.py` the end."""
