"""Mapping between Megatron parameters and Hugging Face tensors, and their sharding."""
