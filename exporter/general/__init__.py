"""Any decoder of transformers as a module with an explicit cache, for architectures outside `model.families`."""
