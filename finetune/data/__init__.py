"""Reads conversations and encodes them as training samples."""
