"""The solve stage's algorithms: max, SmoothQuant, AWQ and SVDQuant scales from statistics."""
