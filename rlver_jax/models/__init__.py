"""The Qwen2.5 model: architecture, attention, log-probabilities, weights."""
