"""How good a policy is: from the dialogues that it had, or that were recorded elsewhere."""
