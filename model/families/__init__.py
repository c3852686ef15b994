"""Families of decoders: how each one's config and tensors become ours. One file for families that are alike."""
