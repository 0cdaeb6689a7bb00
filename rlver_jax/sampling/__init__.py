"""Sampling from a model: slots with key/value caches, and the choice of a token from logits."""
