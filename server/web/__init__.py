"""The chat page: its files, and the API that it uses."""
