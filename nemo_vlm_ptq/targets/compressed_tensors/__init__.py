"""compressed-tensors checkpoints, as vLLM and transformers load them."""
