"""Comparison of exported graphs with the reference decoder."""
