"""The terminal: `llm-chat`."""
