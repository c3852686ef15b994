"""`llm-serve`: serves bundles to OpenAI, Anthropic and Ollama clients, and a chat page to browsers."""
