"""Partners of a dialogue that are models behind an OpenAI-compatible server."""
