"""Tiny models of transformers 5 whose experts are 3-D parameters."""

import pytest
import torch

EXPERTS = {  # name of the model type: whether each expert stores its weights as (in, out)
    "mixtral": False,
    "qwen3_moe": False,
    "gpt_oss": True,
    "deepseek_v3": False,
    "llama4_text": True,
}
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
_OWN_SIZES = {
    "deepseek_v3": {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
                    "qk_rope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1, "first_k_dense_replace": 0,
                    "n_group": 1, "topk_group": 1},
    "llama4_text": {"intermediate_size_mlp": 24, "interleave_moe_layer_step": 1, "attention_chunk_size": 16},
    "qwen3_moe": {"decoder_sparse_step": 1},
    "gpt_oss": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip


def expert_model(name, implementation="eager", dtype=torch.float32):
    """Return a model in evaluation mode, with values that are no initial ones."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **{**_SIZES, **_OWN_SIZES.get(name, {})})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    if name != "llama4_text":  # which has one implementation, of batched products
        model.set_experts_implementation(implementation)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def batch(rows=2, tokens=7):
    """Return token indices."""
    return torch.randint(3, 24, (rows, tokens), generator=torch.Generator().manual_seed(1))


def implementations():
    """Return pairs of a model and an implementation of its experts; both layouts, and all ways in one, are quick."""
    return [
        pytest.param(name, way, marks=[] if name in ("mixtral", "llama4_text") else [pytest.mark.slow])
        for name in EXPERTS
        for way in ("eager", "batched_mm", "grouped_mm")
        if name != "llama4_text" or way == "eager"
    ]
