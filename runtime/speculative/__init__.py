"""Draft tokens: prompt lookup and draft models."""
