"""The reference decoder in PyTorch: configuration, attention, weights and the supported families."""
