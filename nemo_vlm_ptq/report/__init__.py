"""Report of a run: a text table, plots and one HTML page."""
