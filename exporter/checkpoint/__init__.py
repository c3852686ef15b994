"""Readers of checkpoints, one module a format."""
