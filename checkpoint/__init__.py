"""Readers of checkpoints: one sub-package per format."""
