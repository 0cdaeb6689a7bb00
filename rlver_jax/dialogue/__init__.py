"""Dialogues between a policy and a simulated user."""
