"""A data set that is read, encoded and trained on window by window: begin with `prepare.py`."""
