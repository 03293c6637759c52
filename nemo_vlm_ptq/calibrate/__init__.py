"""Observe, then solve: statistics of activations once, scales for any format from them."""
