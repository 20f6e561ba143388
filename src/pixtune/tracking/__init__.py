"""Measurements that a run takes of itself: the figures of its steps, their slowdowns, its memory, `metrics.jsonl`."""
