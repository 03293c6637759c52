"""Ways in and out of NeMo: its recipes and its checkpoints."""
