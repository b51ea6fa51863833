"""What injection refuses, and what it finds."""

import os
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, tokens
from torch import nn

import lightning_peft as lp
from lightning_peft.structure.roles import ROLES
from lightning_peft.structure.selection import select_modules


def chain():
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def replaced():
    model = chain()
    forward = model[0].forward
    model[0].forward = lambda x: forward(x)
    return model


def sharded():
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    model = chain()
    mesh = init_device_mesh("cpu", (1,))
    model[0].weight = nn.Parameter(DTensor.from_local(model[0].weight.detach(), mesh, [Replicate()]))
    return model


def flash():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    model.config._attn_implementation = "flash_attention_2"
    return model


def torch_encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2)


def holder():
    model = chain()
    model[0].peft = nn.Linear(1, 1)
    return model


def chain_of_chains():
    return nn.Sequential(chain())


class Backwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc2, self.fc1 = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x):
        return self.fc2(self.fc1(x))


def two(layer):
    return nn.Sequential(layer, nn.Linear(4, 4))


class Around(lp.Adapter):
    def forward(self, host, inner, *args, **kwargs):
        return inner(*args, **kwargs)

    def reset_parameters(self):
        pass


@dataclass(frozen=True, kw_only=True)
class Wrap(lp.Method):
    name: str = "wrap"
    targets: list[str]

    def adapters(self, model):
        return ((name, Around()) for name in select_modules(model, self.targets))


REFUSED = {
    "read, never called": (torch_encoder, Wrap(targets=["out_proj"]), TypeError, "reads its weight and never calls"),
    "unseen inputs": (torch_encoder, lp.LoRA(targets=["out_proj"], dropout=0.1), ValueError, "dropout at .*unseen"),
    "several projections": (
        lambda: two(nn.MultiheadAttention(8, 2, kdim=4)),
        lp.LoRA(targets=["0"]),
        TypeError,
        "kdim",
    ),
    "not alone": (
        chain,
        [lp.LoRA(targets=["0"], rank=2, decompose=True), lp.LoRA(name="second", targets=["0"], rank=2)],
        ValueError,
        "LoRAAdapter at 0 rewrites the whole weight and cannot share it with LoRAAdapter",
    ),
    "replaced forward": (replaced, lp.LoRA(targets=["0"]), TypeError, "replaced on the instance"),
    "sharded": (sharded, lp.LoRA(targets=["0"], rank=2), TypeError, "sharded already"),
    "own attribute": (holder, lp.LoRA(targets=["0"]), TypeError, "attribute 'peft' or 'peft_order' of its own"),
    "no linear layer": (chain, lp.LoRA(targets=["1"]), TypeError, "Tanh is no known linear layer"),
    "typo": (MODELS["llama"], lp.LoRA(targets=["q_proj", "v_prj"]), ValueError, "'v_prj' matches nothing.*v_proj"),
    "excluded typo": (MODELS["llama"], lp.LoRA(exclude=["layer.0.*"]), ValueError, "'layer.0.*' matches nothing"),
    "all excluded": (MODELS["llama"], lp.LoRA(exclude=["*"]), ValueError, "leaves nothing"),
    "rank too large": (MODELS["llama"], lp.LoRA(rank=17), ValueError, "must be at most 16, got 17"),
    "rank pattern": (MODELS["llama"], lp.LoRA(rank_pattern={"o_proj": 2}), ValueError, "rank_pattern must be a glob"),
    "indivisible": (
        MODELS["llama"],
        lp.KronA(shape_a=[8, 3]),
        ValueError,
        r"shape_a at .*q_proj must be .* dividing 32 \(in; near: 4, 8, 16, 32\) .* \(out; near: 1, 2, 4, 8\), got",
    ),
    "indivisible block": (
        MODELS["llama"],
        lp.KronABlock(shape_a=[3, 8]),
        ValueError,
        "shape_a at .*down_proj must be",
    ),
    "no feed-forward block": (chain, lp.KronABlock(), ValueError, "'feedforward.up' matches nothing"),
    "not a block": (MODELS["llama"], lp.KronABlock(targets=["act_fn"]), ValueError, "holds no linear layers"),
    "a part of a block": (MODELS["llama"], lp.KronABlock(targets=["up_proj"]), ValueError, "holds no linear layers"),
    "no square block": (chain_of_chains, lp.KronABlock(targets=["0"]), ValueError, "takes 8 features and returns 4"),
    "no block left": (MODELS["bert"], lp.KronABlock(exclude=["layer.*"]), ValueError, "leaves nothing"),
    "excluded typo of a block": (MODELS["bert"], lp.KronABlock(exclude=["layers.*"]), ValueError, "matches nothing"),
    "down first": (Backwards, lp.KronABlock(), ValueError, "No up-projection comes before fc2"),
    "flash attention": (flash, lp.PTuningV2(), TypeError, "attn_implementation='flash_attention_2'.*'sdpa'"),
    "too many layers": (MODELS["llama"], lp.LLaMAAdapter(layers=4), ValueError, "layers must be at most 3"),
    "no backbone": (chain, lp.PromptTuning(), ValueError, "give the method targets"),
    "no tokens": (lambda: family("vit"), lp.PromptTuning(), TypeError, "ViTModel reads pixel_values and has no"),
    "no bias": (MODELS["llama"], lp.BitFit(), ValueError, r"BitFit\(add_missing=True\)"),
    "no blocks": (chain, lp.LastLayers(), ValueError, "number of blocks found"),
    "unknown role": (chain, lp.LoRA(), ValueError, "'attention.query' matches nothing.*The model has: \\*"),
    "same name": (MODELS["llama"], [lp.LoRA(), lp.LoRA(rank=2)], ValueError, "Two methods are named 'lora'"),
    "head": (MODELS["llama"], lp.LoRA(), ValueError, "'lm_heda' matches nothing.*lm_head"),
}


@pytest.fixture
def process_group(tmp_path):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_says_what_to_do_and_changes_nothing(case, request):
    make, method, error, said = REFUSED[case]
    if case == "sharded":
        request.getfixturevalue("process_group")
    model = make()
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(error, match=said) as raised:
        lp.inject(model, method, also_train=["lm_heda"] if case == "head" else [])
    assert "\n" not in str(raised.value)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == kinds
    assert all(p.requires_grad for p in model.parameters())


SETTINGS = [
    (lp.LoRA, {"rank": float("nan")}),
    (lp.LoRA, {"rank": 0}),
    (lp.LoRA, {"rank": True}),
    (lp.LoRA, {"alpha": float("nan")}),
    (lp.LoRA, {"dropout": 1.0}),
    (lp.LoRA, {"rank_pattern": {"x": -1}}),
    (lp.LLaMAAdapter, {"length": 0}),
    (lp.LLaMAAdapter, {"gate_warmup_steps": -1}),
    (lp.PromptTuning, {"init": "txt"}),
    (lp.PromptTuning, {"init": "text"}),
    (lp.PromptTuning, {"embeddings": "x"}),
    (lp.LastLayers, {"count": 0}),
    (lp.KronA, {"shape_a": [4]}),
    (lp.KronA, {"shape_a": [4, 0]}),
    (lp.KronA, {"factor": 0}),
    (lp.KronA, {"factor": 8, "shape_a": [4, 4]}),
    (lp.KronA, {"scale": 0.0}),
    (lp.KronABlock, {"factor": 2.5}),
    (lp.KronABlock, {"scale": float("inf")}),
    (lp.KronABlock, {"factor": 8, "shape_a": [4, 4]}),
]


@pytest.mark.parametrize(("method", "settings"), SETTINGS, ids=str)
def test_settings_that_cannot_be_are_refused_at_once(method, settings):
    with pytest.raises(
        ValueError, match=rf"({'|'.join([*settings, 'rank', 'init_text', 'embeddings'])}) must be .*, got "
    ):
        method(**settings)


def test_a_string_for_a_list_of_targets_is_refused():
    with pytest.raises(TypeError, match=r"write \['query'\]"):
        lp.inject(MODELS["bert"](), lp.LoRA(targets="query"))


def test_a_second_method_joins_the_first():
    model = lp.inject(MODELS["llama"](), lp.LoRA(rank=2))
    lp.inject(model, lp.PromptTuning(length=2), also_train=["lm_head"])
    assert lp.summary(model).trainable == 3 * 2 * (32 + 32 + 32 + 16) + 2 * 32 + 64 * 32
    assert len(list(lp.adapters(model))) == 7
    with pytest.raises(ValueError, match="Two methods are named 'lora'"):
        lp.inject(model, lp.LoRA(rank=4))
    lp.detach(model)
    assert all(p.requires_grad for p in model.parameters())


def test_tied_weights_are_not_merged():
    model = chain()
    model.append(nn.Linear(8, 8))
    model[3].weight = model[0].weight
    lp.inject(model, lp.LoRA(targets=["0"], rank=2))
    with pytest.raises(ValueError, match="0 shares a parameter"):
        lp.merge(model)


def test_tied_output_layers_are_trained_only_by_name():
    from transformers import GPT2Config, GPT2LMHeadModel

    tied = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    with pytest.raises(ValueError, match=r"tied to transformer\.wte\.weight"):
        lp.inject(tied, lp.OutputLayers())
    lp.inject(tied, lp.OutputLayers(targets=["lm_head"]))
    assert {n for n, p in tied.named_parameters() if p.requires_grad} == {"transformer.wte.weight"}


@pytest.mark.parametrize("method", [lp.LLaMAAdapter(length=2), lp.PTuningV2(length=2)], ids=["llama", "prefix"])
def test_attention_that_is_not_called_at_run_time_is_noticed(method, monkeypatch):
    model = lp.inject(MODELS["plain"](), method)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, mask: v)
    with pytest.raises(RuntimeError, match="did not call attention that can be changed.*'sdpa' or 'eager'"):
        model(tokens())


def test_a_prompt_longer_than_the_positions_is_noticed():
    model = lp.inject(MODELS["bert"](), lp.PromptTuning(length=42))
    with pytest.raises(ValueError, match="49 positions, virtual tokens included, are more than the model's 48"):
        model(tokens())


def family(name):
    import transformers as t

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with torch.device("meta"):
        return {
            "bert": lambda: t.BertModel(t.BertConfig(vocab_size=8, **small)),
            "distilbert": lambda: t.DistilBertModel(t.DistilBertConfig(vocab_size=8, dim=8, n_layers=1, n_heads=2)),
            "deberta": lambda: t.DebertaV2Model(t.DebertaV2Config(vocab_size=8, **small)),
            "gpt2": lambda: t.GPT2Model(t.GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2)),
            "llama": lambda: t.LlamaModel(t.LlamaConfig(vocab_size=8, **small)),
            "t5": lambda: t.T5Model(t.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
            "bart": lambda: t.BartModel(
                t.BartConfig(vocab_size=8, d_model=8, encoder_layers=1, decoder_layers=1,
                             encoder_attention_heads=2, decoder_attention_heads=2)
            ),
            "vit": lambda: t.ViTModel(t.ViTConfig(image_size=8, patch_size=4, **small)),
            "torch": torch_encoder,
        }[name]()  # fmt: skip


FEEDFORWARD = {
    "bert": 1,
    "distilbert": 1,
    "deberta": 1,
    "gpt2": 1,
    "llama": 1,
    "t5": 2,
    "bart": 2,
    "vit": 1,
    "torch": 2,
}
ATTENTIONS = {"bert": 1, "distilbert": 1, "deberta": 1, "gpt2": 1, "llama": 1, "t5": 3, "bart": 3, "vit": 1, "torch": 2}


@pytest.mark.parametrize("name", FEEDFORWARD)
def test_roles_find_each_layer_of_a_family_once(name):
    model = family(name)
    found = {role: list(ROLES[role](model)) for role in ROLES}
    assert len(found["feedforward.down"]) == FEEDFORWARD[name]
    assert len(found["feedforward.up"]) == FEEDFORWARD[name] * (2 if name == "llama" else 1)
    for role in ("attention.query", "attention.key", "attention.value", "attention.output"):
        assert len(found[role]) == ATTENTIONS[name], role
    assert len(found["attention"]) == ATTENTIONS[name]
    separate = {n for role in ROLES if "." in role for n in found[role]}
    assert separate == set(found["all-linear"])


def test_globs_match_ends_of_names_in_the_models_order():
    model = MODELS["llama"]()
    assert list(select_modules(model, ["layers.[02].self_attn.v_proj", "layers.0.*.q_proj"])) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.2.self_attn.v_proj",
    ]
    assert len(select_modules(model, ["q_proj"], exclude=["layers.1.*"])) == 2
    assert not select_modules(model, ["mlp"]).keys() & select_modules(model, ["mlp.*"]).keys()


def test_a_convolutional_net_takes_lora_and_its_last_layers():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 2)).eval()
    x = torch.randn(2, 3, 4, 4)
    y = model(x)
    lp.inject(model, [lp.LoRA(targets=["0"], rank=2), lp.OutputLayers()])
    assert torch.equal(model(x), y)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "0.peft.lora.a", "0.peft.lora.b", "3.weight", "3.bias",
    }  # fmt: skip
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    assert model[0].peft["lora"].b.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["opt", "distilbert", "roberta", "qwen2"])
def test_prompts_reach_the_output_and_get_gradients(name):
    import transformers as t

    small = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = {
        "opt": lambda: t.OPTForCausalLM(t.OPTConfig(ffn_dim=8, word_embed_proj_dim=8, **small)),
        "distilbert": lambda: t.DistilBertForMaskedLM(t.DistilBertConfig(vocab_size=16, dim=8, n_layers=1, n_heads=2)),
        "roberta": lambda: t.RobertaForMaskedLM(t.RobertaConfig(intermediate_size=8, **small)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(intermediate_size=8, num_key_value_heads=2, **small)),
    }[name]()
    lp.inject(model, lp.PromptTuning(length=2))
    x = torch.tensor([[3, 4, 5]])
    for output in (model(x).logits, model(x, return_dict=False)[0]):
        assert output.shape == (1, 3, 16)
        ((*_, adapter),) = lp.adapters(model)
        adapter.prompt.grad = None
        output.square().sum().backward()
        assert adapter.prompt.grad.abs().sum() > 0
