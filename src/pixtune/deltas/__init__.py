"""What adapter files add to a model's weights: read, compared, joined, cut to a rank, merged and extracted.

Begin with `delta.py`: all of it is arithmetic on the small factors of a layer's delta. `adapter_file.py` reads them.
"""
