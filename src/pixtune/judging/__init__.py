"""Tells whether a run learns, and what: begin with `validation.py`, the loss on pictures that are held out."""
