"""Screens over the chat: choosing, looking closer."""
