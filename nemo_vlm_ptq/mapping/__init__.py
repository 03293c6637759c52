"""Names and layouts: how tensors of a Hugging Face checkpoint become Megatron shards and back."""
