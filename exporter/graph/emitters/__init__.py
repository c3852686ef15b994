"""How each weight format is written into a graph."""
