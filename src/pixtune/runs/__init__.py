"""Runs as seen from outside, by the files that they write: what state one is in, and what is asked of it.

`read` reads a folder, `state` says what is found, `log` and `curve` make reading again and again cheap. Nothing here
imports torch, prints, or takes a run's lock.
"""
