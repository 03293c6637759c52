"""Calibration: observe gathers activation statistics once, solve derives any format's scales."""
