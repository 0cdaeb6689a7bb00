"""RLVER in JAX: reinforcement learning of empathetic dialogue from verifiable emotion rewards."""
