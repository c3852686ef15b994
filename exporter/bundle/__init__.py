"""Writing the bundle folder."""
