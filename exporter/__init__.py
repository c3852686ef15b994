"""The exporter: a PyTorch checkpoint in, a validated bundle folder out."""
