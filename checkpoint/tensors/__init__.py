"""Files of plain tensors: torch.save archives and safetensors."""
