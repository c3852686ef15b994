"""Adapters, one module per protocol: wire request to `ChatRequest` or `TextRequest`, and `Event`s to the wire."""
