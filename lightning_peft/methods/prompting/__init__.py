"""Virtual tokens: prompts in front of the input embeddings, prefixes in front of keys and values."""
