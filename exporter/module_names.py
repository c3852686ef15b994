"""Module paths of the decoder that the exporter treats specially."""

EMBEDDING = "embed_tokens"
HEAD = "lm_head"
HEAD_MIX = "head_mix"
