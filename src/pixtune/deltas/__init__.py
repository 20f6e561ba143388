"""Arithmetic of what adapters add to a model's weights: compared, joined, cut to a rank, merged and extracted.

Begin with `delta.py`: it is done on the small factors of each layer's delta. `adapter_file.py` reads them.
"""
