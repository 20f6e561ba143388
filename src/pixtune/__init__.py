"""pixtune fine-tunes Qwen-Image, Qwen-Image-Edit and FLUX.1-dev on the GPU a person has."""

__version__ = "0.1.0"
