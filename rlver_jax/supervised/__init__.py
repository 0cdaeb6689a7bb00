"""Training on examples: read, packed into rows, learned from."""
