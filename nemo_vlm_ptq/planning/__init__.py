"""Checks and estimates made before a run: plan, memory forecast, layout, preflight check."""
