"""The embedded world, and how the two tiny models that live in it are made."""
