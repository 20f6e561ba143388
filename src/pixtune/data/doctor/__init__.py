"""Measures and findings on a data set beyond whether it can be read: begin with `examine.py`."""
