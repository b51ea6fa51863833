"""``lp.targets`` and ``lightning-peft targets``: what can be targeted in a model, as one table."""

import pytest
import torch
from expert_models import expert_model
from installed import needs
from models import BEFORE_5, MODELS
from torch import nn

import lightning_peft as lp
from lightning_peft.cli.main import main

GPT2 = """\
target            count  name                         detail
attention.query   3      transformer.h.*.attn.c_attn  32 -> 96, rows 0:32
attention.key     3      transformer.h.*.attn.c_attn  32 -> 96, rows 32:64
attention.value   3      transformer.h.*.attn.c_attn  32 -> 96, rows 64:96
attention.output  3      transformer.h.*.attn.c_proj  32 -> 32
feedforward.up    3      transformer.h.*.mlp.c_fc     32 -> 128
feedforward.down  3      transformer.h.*.mlp.c_proj   128 -> 32
attention         3      transformer.h.*.attn         GPT2Attention
all-linear        3      transformer.h.*.attn.c_attn  32 -> 96
all-linear        3      transformer.h.*.attn.c_proj  32 -> 32
all-linear        3      transformer.h.*.mlp.c_fc     32 -> 128
all-linear        3      transformer.h.*.mlp.c_proj   128 -> 32
blocks            3      transformer.h.*              GPT2Block
output            1      lm_head                      32 -> 64
norms             3      transformer.h.*.ln_1         LayerNorm
norms             3      transformer.h.*.ln_2         LayerNorm
norms             1      transformer.ln_f             LayerNorm
tower             1      the model                    scope language:...
Roles were found by names. A glob on the end of a name is a target, too."""


@needs("transformers")
def test_the_table_names_roles_rows_blocks_head_and_towers():
    assert str(lp.targets(MODELS["gpt2"].make())) == GPT2


def test_an_example_measures_a_module_of_ones_own():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.TransformerEncoder(block, 2, enable_nested_tensor=False), nn.Linear(16, 3)
    )
    table = lp.targets(model, example_inputs=torch.randn(1, 4, 8))
    assert table.measured
    shown = {(row.target, row.count, row.name, row.detail) for row in table.rows}
    assert ("attention.key", 2, "*.layers.*.self_attn", "16 -> 48, rows 16:32") in shown
    assert ("feedforward.down", 2, "*.layers.*.linear2", "32 -> 16") in shown
    assert [row.name for row in table.rows if row.target == "output"] == ["*"]


@needs("transformers")
def test_the_command_line_prints_the_table_of_a_configuration(capsys):
    sizes = "model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 3, num_attention_heads: 4"
    main(["targets", "--seed_everything=1", "--model=CausalLM", f"--model.config={{{sizes}, vocab_size: 64}}"])
    lines = capsys.readouterr().out.splitlines()
    assert "attention.query   3      network.model.layers.*.self_attn.q_proj          32 -> 32" in lines
    assert [line.split()[:3] for line in lines if line.startswith("blocks")] == [
        ["blocks", "3", "network.model.layers.*"]
    ]


def clip():
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config={**sizes, "vocab_size": 64, "eos_token_id": 2}, vision_config=vision))


towers_are_models = pytest.mark.skipif(BEFORE_5, reason="towers are no models of their own before transformers 5")


@needs("transformers")
@towers_are_models
@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("vision:attention.query", [f"vision_model.encoder.layers.{i}.self_attn.q_proj" for i in (0, 1)]),
        ("text_model:*.fc1", [f"text_model.encoder.layers.{i}.mlp.fc1" for i in (0, 1)]),
        ("language:feedforward.up", [f"text_model.encoder.layers.{i}.mlp.fc1" for i in (0, 1)]),
        ("layers.1:attention.value", [f"{m}_model.encoder.layers.1.self_attn.v_proj" for m in ("text", "vision")]),
    ],
)
def test_a_scope_limits_a_role_or_a_glob(target, expected):
    model = lp.inject(clip(), lp.LoRA(rank=2, targets=[target]))
    assert [name for name, *_ in lp.adapters(model)] == expected


@needs("transformers")
@towers_are_models
def test_scopes_of_several_targets_are_apart():
    model = lp.inject(clip(), lp.LoRA(rank=2, targets=["vision:attention.key", "language:attention.value"]))
    share = "(14.1 % of their weights)"  # 1,056 of 7,504
    coverage = f"2 of 2 blocks of text_model {share}, 2 of 2 blocks of vision_model {share}"
    assert coverage in str(lp.summary(model))
    found = [name.split(".")[0] + name[-6:] for name, *_ in lp.adapters(model)]
    assert found == ["text_modelv_proj"] * 2 + ["vision_modelk_proj"] * 2


@needs("transformers")
@towers_are_models
def test_a_scope_that_means_nothing_lists_the_towers():
    towers = r"Towers: text_model \(language\), vision_model \(vision\)"
    with pytest.raises(ValueError, match=rf"The scope 'audio' means no module.*{towers}"):
        lp.inject(clip(), lp.LoRA(rank=2, targets=["audio:attention.key"]))


@pytest.mark.skipif(BEFORE_5, reason="experts are modules before transformers 5")
def test_experts_are_listed_by_their_weights():
    rows = {(row.target, row.name): (row.count, row.detail) for row in lp.targets(expert_model("gpt_oss")).rows}
    up, down = (f"model.layers.*.mlp.experts.{part}" for part in ("gate_up_proj", "down_proj"))
    for role, name, detail in (("experts.up", up, "32 -> 48"), ("experts.down", down, "24 -> 32")):
        assert rows[role, name] == rows["all-linear", name] == (2, f"4 experts, {detail}")
    assert [name for role, name in rows if role == "experts.up"] == [up]
