"""Who judges recorded dialogues: a language model here, one behind a server, or word lists."""
