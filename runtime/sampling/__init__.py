"""Sampling: parameters, logits processors, transforms and the sampler."""
