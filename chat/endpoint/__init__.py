"""Chats with models behind OpenAI-compatible endpoints."""
