"""Megatron-core: process groups, the decoder, its checkpoints and its forward pass."""
