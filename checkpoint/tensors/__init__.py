"""Files of plain tensors: safetensors and torch.save."""
