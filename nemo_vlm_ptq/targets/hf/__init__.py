"""Hugging Face checkpoints: ModelOpt's unified export, and NF4 as bitsandbytes serializes it."""
