"""Exports PyTorch checkpoints to validated bundles."""
