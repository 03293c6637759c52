"""Verification of exported checkpoints; shares no arithmetic with their writers."""
