"""Layers whose names HF PEFT reads otherwise than the model has them, and models whose settings it asks for."""

import importlib.util

import pytest
import torch
from peft_models import disturbed

import lightning_peft as lp

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed"),
    pytest.mark.filterwarnings("ignore"),
]
SIZES = {"hidden_size": 32, "vocab_size": 99, "num_hidden_layers": 2, "num_attention_heads": 4}


def deepseek():
    """Its first block is dense, the second has a shared expert; both call their layers as experts are called."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        **SIZES, intermediate_size=48, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, v_head_dim=8,
        qk_nope_head_dim=8, num_key_value_heads=4, pad_token_id=0,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config).eval()


def mamba():
    torch.manual_seed(0)
    return transformers.MambaForCausalLM(transformers.MambaConfig(hidden_size=32, vocab_size=99, num_hidden_layers=2))


def xglm():
    torch.manual_seed(0)
    config = transformers.XGLMConfig(vocab_size=99, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4)
    return transformers.XGLMForCausalLM(config)


def read(model):
    with torch.no_grad():
        return model.eval()(torch.arange(1, 11)[None]).logits


@pytest.mark.parametrize(
    "method", [lp.LoRA(rank=2, targets=["down_proj"]), lp.IA3(targets=["down_proj"], feedforward_targets=[])]
)
def test_layers_that_are_called_as_experts_are_the_same_in_peft_or_refused(method, tmp_path):
    """With fused experts, LoRA there adapts the experts and leaves these layers out; only a warning says so."""
    import peft

    model = disturbed(lp.inject(deepseek(), method))
    fuses = not any(name.endswith("experts.0.down_proj") for name, _ in deepseek().named_modules())
    if isinstance(method, lp.LoRA) and fuses:
        with pytest.raises(
            ValueError, match=r"LoRA on model.layers.0.mlp.down_proj, .* takes layers of these names for"
        ):
            lp.export_peft(model, tmp_path / "folder")
        assert not (tmp_path / "folder").exists()
        return
    lp.export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(deepseek(), tmp_path)
    torch.testing.assert_close(read(theirs), read(model), atol=1e-5, rtol=0)
    assert (read(model) - read(deepseek())).abs().max() > 1e-3


def test_other_layers_of_such_a_model_are_the_same_in_peft(tmp_path):
    import peft

    model = disturbed(lp.inject(deepseek(), lp.LoRA(rank=2, targets=["q_b_proj", "o_proj"])))
    lp.export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(deepseek(), tmp_path)
    torch.testing.assert_close(read(theirs), read(model), atol=1e-5, rtol=0)
    assert (read(model) - read(deepseek())).abs().max() > 1e-3


@pytest.mark.parametrize("method", [lp.LoRA(rank=2, targets=["out_proj"]), lp.AdaLoRA(targets=["out_proj"])])
def test_layers_of_mamba_that_peft_refuses_are_refused(method, tmp_path):
    model = lp.inject(mamba(), method)
    with pytest.raises(ValueError, match="layers.0.mixer.out_proj.* it refuses these layers of Mamba"):
        lp.export_peft(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("make", [mamba, xglm])
def test_prompts_load_where_the_models_settings_name_no_heads(make, tmp_path):
    import peft

    model = disturbed(lp.inject(make(), lp.PromptTuning(length=2)))
    lp.export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(read(theirs)[:, 2:], read(model), atol=1e-5, rtol=0)
    assert (read(model) - read(make())).abs().max() > 1e-3
