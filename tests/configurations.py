"""The configuration files of the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
RECIPES = [config for config in CONFIGS if config.parent.name == "recipes"]  # their own tests run them
TRAINERS = [config for config in CONFIGS if config.parent.name == "trainer"]  # run in two processes
FITS = [config for config in CONFIGS if config not in [*RECIPES, *TRAINERS]]
LLAMA = """{model_type: llama, vocab_size: 30522, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 3,
num_attention_heads: 2}"""
