"""Graph passes, one per module; each docstring states what the pass requires, does and ensures."""
