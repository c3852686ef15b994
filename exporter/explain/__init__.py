"""`llm-export --explain` and `--plot`."""
