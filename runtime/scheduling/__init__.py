"""Continuous batching: sequences, slots and the scheduler."""
