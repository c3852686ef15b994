"""Screens of the full-screen chat, one module each; the chat itself is `chat.py`."""
