"""Emitters: write the graph nodes that use the weights of each format."""
