"""From dialogues to a policy update: token rows, advantages, losses, the update."""
