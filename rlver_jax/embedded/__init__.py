"""The embedded world, and how tiny models that live in it are made."""
