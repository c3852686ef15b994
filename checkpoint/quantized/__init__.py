"""Quantized weights of Hugging Face checkpoints."""
