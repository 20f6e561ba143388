"""Writes captions for pictures by a vision-language model; begin with `describe.py`. It trains nothing."""
