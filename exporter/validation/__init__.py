"""Comparison of exported models with the reference decoder."""
