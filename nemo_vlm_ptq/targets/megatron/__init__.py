"""Quantized Megatron checkpoints: modelopt quantizers, their modules, saving and loading."""
