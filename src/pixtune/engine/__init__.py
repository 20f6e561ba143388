"""Carries a plan out on the device, one technique a file. Knows no model.

`apply.py` puts the techniques in their order.
"""
