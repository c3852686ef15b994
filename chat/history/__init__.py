"""Conversations: the message tree, the SQLite store, search, import and export."""
