"""Readers and writers of checkpoint files: safetensors, torch_dist folders, config.json."""
