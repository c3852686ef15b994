"""Vocabularies that are not a tokenizer.json."""
