"""Text: tokenizer, chat templates, prompts and reasoning."""
