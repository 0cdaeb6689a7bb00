"""Simulated users: scripted, and a frozen language model."""
