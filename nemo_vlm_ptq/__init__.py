"""Post-training quantization of vision-language models, independent of the parallel layout."""

__version__ = "0.1.0"
