"""Encode quantized weights and write checkpoints, as far as the targets have it in common."""
