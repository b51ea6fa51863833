"""Virtual tokens: prompts before the input embeddings, prefixes before keys and values."""
