"""The observe stage's loop: forward hooks, reduction over ranks, and progress for resuming."""
