"""Reads configs of other trainers and writes ours: a table of keys for each, and one engine. Begin at engine.py."""
