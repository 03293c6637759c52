"""Proof that a written checkpoint is what it should be; shares nothing with the exporters."""
