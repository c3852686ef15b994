"""Readers of checkpoints, one sub-package per format. `source.open_checkpoint` selects the reader."""
