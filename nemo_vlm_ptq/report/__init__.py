"""What a person looks at in the end: a text table, plots, one HTML page."""
