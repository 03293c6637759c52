"""Export targets, one package each; registry.py lists them."""
