"""The configuration files of the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
RECIPES = [config for config in CONFIGS if config.parent.name == "recipes"]  # their own tests run them
TRAINERS = [config for config in CONFIGS if config.parent.name == "trainer"]  # run in two processes
FITS = [config for config in CONFIGS if config not in [*RECIPES, *TRAINERS]]
LLAMA = """{model_type: llama, vocab_size: 30522, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 3,
num_attention_heads: 2}"""
# Small models in place of those that only a network knows, by the task of the configuration.
SMALL = {
    "CausalLM": LLAMA,
    "Choices": "{model_type: t5, vocab_size: 30522, d_model: 16, d_kv: 8, d_ff: 16, num_layers: 1, num_heads: 2}",
    "Seq2Seq": "{model_type: t5, vocab_size: 30522, eos_token_id: 102, d_model: 16, d_kv: 8, d_ff: 16, num_layers: 1}",
    "ImageClassification": "{model_type: vit, image_size: 16, patch_size: 8, hidden_size: 16, num_hidden_layers: 1,"
    " num_attention_heads: 2, intermediate_size: 16}",
}
