"""State dicts in Meta's naming, with their config and tokenizer."""
