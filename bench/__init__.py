"""The benchmark: `llm-bench`."""
