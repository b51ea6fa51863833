"""Heads, last layers, hybrids and towers of architectures whose names mislead, with the layers that are right."""

import copy

import pytest
import torch
from installed import needs
from models import BEFORE_5
from torch import nn

import lightning_peft as lp
from lightning_peft.structure.structure_of import structure_of
from lightning_peft.structure.towers import towers

transformers = pytest.importorskip("transformers")

USUAL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**USUAL, "num_key_value_heads": 2, "vocab_size": 64, "pad_token_id": 0}


def build(head, family, **sizes):
    torch.manual_seed(0)
    return getattr(transformers, head).from_config(transformers.AutoConfig.for_model(family, **sizes)).eval()


def classifier(family):
    return build("AutoModelForSequenceClassification", family, **USUAL, vocab_size=64, num_labels=3, pad_token_id=0)


def detr():
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    sizes = {
        f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in (("layers", 2), ("ffn_dim", 48))
    }
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 3, "num_labels": 3}
    config = transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, backbone_config=backbone, d_model=32,
        **sizes, **heads,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.DetrForObjectDetection(config).eval()


def segformer():
    sizes = {"hidden_sizes": [16, 32], "depths": [2, 2], "num_attention_heads": [2, 4], "num_encoder_blocks": 2}
    more = {"sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]}
    return build("AutoModelForSemanticSegmentation", "segformer", **sizes, **more, decoder_hidden_size=16, num_labels=3)


class ViT(nn.Module):
    """Laid out as torchvision's, with the head before the encoder, and a position in each block's name."""

    def __init__(self):
        super().__init__()
        self.conv_proj, self.heads, self.encoder = nn.Conv2d(3, 32, 8, 8), nn.Sequential(), nn.Module()
        self.heads.add_module("head", nn.Linear(32, 3))
        self.encoder.layers, self.encoder.ln = nn.Sequential(), nn.LayerNorm(32)
        for i in range(3):
            block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True)
            self.encoder.layers.add_module(f"encoder_layer_{i}", block)
        self.example_input_array = torch.randn(1, 3, 16, 16)

    def forward(self, x):
        tokens = self.conv_proj(x).flatten(2).mT
        return self.heads(self.encoder.ln(self.encoder.layers(tokens))[:, 0])


def trained(model, method):
    """Return the modules of which a method trains parameters of the base."""
    lp.inject(model, method)
    return {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad and ".peft." not in name}


CLASSIFIER = {"classifier.dense", "classifier.out_proj"}


@needs("transformers")
@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "electra"])
def test_the_head_is_what_computes_the_logits_wherever_it_is_registered(family):
    model = classifier(family)
    assert trained(copy.deepcopy(model), lp.OutputLayers()) == CLASSIFIER
    assert trained(copy.deepcopy(model), lp.PTuningV2(length=2)) == CLASSIFIER
    last = trained(copy.deepcopy(model), lp.LastLayers(count=1))
    assert last >= CLASSIFIER
    assert {name.split("layer.")[1][0] for name in last - CLASSIFIER} == {"1"}
    lp.inject(model, lp.Bottleneck(size=2))
    assert {name.split(".layer.")[1][2:] for name, *_ in lp.adapters(model)} == {
        "attention.output.dense",
        "output.dense",
    }


LAST = {  # the last block, and what of other modules follows it
    "vit": (ViT, "encoder.layers.encoder_layer_2", {"encoder.ln", "heads.head"}),
    "detr": (
        detr,
        "model.decoder.layers.1",
        {"model.decoder.layernorm", "class_labels_classifier", *(f"bbox_predictor.layers.{i}" for i in range(3))},
    ),
    "segformer": (
        segformer,
        "segformer.stages.1.blocks.1",
        {
            *(f"decode_head.linear_projections.{i}.proj" for i in range(2)),
            *("segformer.stages.1.layer_norm", "decode_head.linear_fuse", "decode_head.batch_norm"),
            "decode_head.classifier",
        },
    ),
}


SINCE_5 = {"segformer": pytest.mark.skipif(BEFORE_5, reason="its stages are laid out otherwise before transformers 5")}


@needs("transformers")
@pytest.mark.parametrize("name", [pytest.param(name, marks=SINCE_5.get(name, ())) for name in LAST])
def test_last_layers_are_the_last_block_and_what_follows(name):
    make, block, following = LAST[name]
    found = trained(make(), lp.LastLayers(count=1))
    inside = {module for module in found if module.startswith(f"{block}.")}
    assert inside
    assert found - inside == following


@needs("transformers")
def test_a_layer_whose_inputs_are_always_zero_is_left_out():
    model = detr()
    with pytest.warns(UserWarning, match=r"value leaves out model.decoder.layers.0.self_attn.v_proj: the inputs are"):
        lp.inject(model, lp.LoRA(rank=2))
    names = {name for name, *_ in lp.adapters(model)}
    assert "model.decoder.layers.1.self_attn.v_proj" in names
    assert "model.decoder.layers.0.self_attn.v_proj" not in names


@needs("transformers")
def test_projections_to_several_streams_are_no_blocks():
    sizes = {**DECODER, "head_dim": 8, "layer_types": ["full_attention"] * 2, "hidden_size_per_layer_input": 8}
    more = {"vocab_size_per_layer_input": 64, "laurel_rank": 4, "num_kv_shared_layers": 0, "altup_num_inputs": 2}
    more |= {"activation_sparsity_pattern": [0.0, 0.0]}
    structure = structure_of(build("AutoModelForCausalLM", "gemma3n_text", **sizes, **more))
    assert structure.names["blocks"] == ["model.layers.0", "model.layers.1"]
    assert structure.names["output"] == ["model.altup_unembed_projections.0", "lm_head"]


def mamba():
    return build("AutoModelForCausalLM", "mamba", hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)


@needs("transformers")
@pytest.mark.skipif(BEFORE_5, reason="it calls the layers before transformers 5")
def test_weights_that_mamba_reads_are_left_out_of_all_linear_and_refused_by_name():
    model = mamba()
    with pytest.warns(UserWarning, match=r"leaves out .*0\.mixer\.dt_proj.*: the weight is read outside of calls"):
        lp.inject(model, lp.LoRA(rank=2, targets=["all-linear"]))
    assert {name.rpartition(".")[2] for name, *_ in lp.adapters(model)} == {"in_proj", "x_proj", "out_proj"}
    for *_, adapter in lp.adapters(model):
        nn.init.normal_(adapter.b, std=0.1)
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        live = model(ids).logits
        torch.testing.assert_close(lp.merge(model)(ids).logits, live, atol=1e-4, rtol=1e-4)
    for name in ("conv1d", "dt_proj"):
        with pytest.raises(TypeError, match=rf"backbone.layers.0.mixer.{name} is read outside of its calls"):
            lp.inject(mamba(), lp.LoRA(rank=2, targets=[name]))


def jamba():
    sizes = {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 4}
    more = {"num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_d_conv": 2, "mamba_expand": 2}
    return build("AutoModelForCausalLM", "jamba", **DECODER, **sizes, **more, mamba_dt_rank=4, use_mamba_kernels=False)


@needs("transformers")
def test_blocks_of_mixed_types_are_blocks_and_those_without_attention_are_said():
    model = jamba()
    assert structure_of(model).names["blocks"] == ["model.layers.0", "model.layers.1"]
    with pytest.warns(UserWarning, match=r"Adapters reach 1 of 2 blocks .* nothing in model.layers.0 plays a role"):
        lp.inject(model, lp.LoRA(rank=2))
    assert {name for name, *_ in lp.adapters(model)} == {f"model.layers.1.self_attn.{p}_proj" for p in "qv"}


def llava():
    vision = transformers.CLIPVisionConfig(**USUAL, image_size=16, patch_size=8)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**DECODER),
        vision_config=vision,
        vision_feature_layer=-1,
        image_token_index=60,
        image_token_id=60,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


@needs("transformers")
def test_towers_of_a_model_that_sees_are_told_apart_and_what_is_unused_is_left_out():
    model = llava()
    assert set(towers(model).values()) == {"vision", "language"}
    for scope, part in (("vision", "vision_tower"), ("language", "language_model")):
        adapted = lp.inject(copy.deepcopy(model), lp.LoRA(rank=2, targets=[f"{scope}:attention.query"]))
        names = [name for name, *_ in lp.adapters(adapted)]
        assert len(names) == 2
        assert all(f".{part}." in f".{name}" for name in names)
    with pytest.warns(UserWarning, match=r"norms leaves out .*post_layernorm: no output depends on the parameters"):
        names = trained(model, lp.Bottleneck(size=2))
    assert not [name for name in names if name.endswith("post_layernorm")]
    assert "2 of 2 blocks of model.vision_tower" in str(lp.summary(model))
