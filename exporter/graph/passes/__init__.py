"""Graph steps: one step in one file, each saying what it requires, does and ensures."""
