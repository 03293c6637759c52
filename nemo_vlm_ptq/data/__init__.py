"""Calibration and evaluation data: questions about images, from a folder or drawn scenes."""
