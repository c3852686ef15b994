"""JSON schemas: what is enforced, what is an annotation, and what is refused."""
