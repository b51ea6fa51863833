"""``KNOWN_FAMILIES``: model types of transformers in which names tell what a trace finds."""

from __future__ import annotations

# tests/structure/test_known_families.py compares names with a trace, for each family and its usual heads.
KNOWN_FAMILIES = frozenset(
    {
        *("bert", "distilbert", "electra", "roberta", "vit", "t5", "mt5"),
        *("cohere", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt2", "granite", "llama", "mistral", "olmo2"),
        *("qwen2", "qwen3", "starcoder2"),
    }
)
