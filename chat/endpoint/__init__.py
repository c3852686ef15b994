"""OpenAI-compatible endpoints as responders."""
