"""State dicts with the tensor names of Meta's Llama releases."""
