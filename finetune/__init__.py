"""Fine-tunes checkpoints on conversations."""
