"""Rows of embeddings that train: the formula, ties, what stays frozen, several adapters, refusals."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import MODELS
from token_models import IDS, MAKE, build, inputs, moved, tokenizer
from torch import nn

import lightning_peft as lp

EACH = [pytest.param(name, marks=[] if name in ("tied", "gemma") else pytest.mark.slow) for name in MAKE]


def adapted(name, dtype=torch.float32, **settings):
    return lp.inject(build(name, dtype), lp.TrainableTokens(tokens=IDS, **settings))


def written(name, rows, heads=None):
    """Return the base with rows written into its embeddings, and so into all layers tied to them."""
    model = build(name)
    with torch.no_grad():
        model.get_input_embeddings().weight[IDS] = rows
        if heads is not None:
            model.get_output_embeddings().weight[IDS] = heads
    return model


def gradient(model, name):
    model(**inputs(name)).logits.square().sum().backward()


@pytest.mark.parametrize("name", EACH)
def test_outputs_and_gradients_are_those_of_the_base_with_these_rows(name):
    model = moved(adapted(name))
    (rows,) = (p for p in model.parameters() if p.requires_grad)
    reference = written(name, rows)
    torch.testing.assert_close(model(**inputs(name)).logits, reference(**inputs(name)).logits, atol=1e-4, rtol=1e-5)
    gradient(model, name)
    gradient(reference, name)
    expected = reference.get_input_embeddings().weight.grad[IDS]
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(rows.grad, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EACH)
def test_it_starts_as_the_base_and_merging_keeps_ties(name, dtype):
    base, model = build(name, dtype), adapted(name, dtype)
    with torch.no_grad():
        assert torch.equal(model(**inputs(name)).logits, base(**inputs(name)).logits)
        y = moved(model)(**inputs(name)).logits
        rows = next(p for p in model.parameters() if p.requires_grad).detach().clone()
        z = lp.merge(model)(**inputs(name)).logits
    torch.testing.assert_close(z, y, atol=1e-4 if dtype == torch.float32 else 0.1, rtol=0.02)
    assert torch.equal(model.get_input_embeddings().weight[IDS], rows.to(dtype))
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert model.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("name", ["llama", "tied"])
@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in (torch.optim.SGD, torch.optim.Adagrad)),
    ],
)
def test_no_other_row_moves_a_bit_even_with_weight_decay(name, optimizer):
    base = build(name)
    model = lp.inject(build(name), [lp.LoRA(targets=["q_proj"]), lp.TrainableTokens(tokens=IDS)]).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    steps = optimizer(trained, lr=0.1, weight_decay=0.5)
    for _ in range(3):
        steps.zero_grad()
        model(**inputs(name)).logits.logsumexp(-1).sum().backward()
        steps.step()
    state = sum(v.numel() for values in steps.state.values() for v in values.values() if v.dim() > 0)
    per_value = {torch.optim.AdamW: 2, torch.optim.SGD: 0, torch.optim.Adagrad: 1}[optimizer]
    assert state == per_value * (3 * 32 + 3 * 2 * 8 * 32)  # three rows, and the factors of three layers
    lp.merge(model)
    old, new = base.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert [i for i in range(64) if not torch.equal(old[i], new[i])] == IDS
    assert torch.equal(base.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


def test_an_untied_head_trains_rows_of_its_own_when_asked():
    model = moved(adapted("llama", output_head=True))
    rows, heads = (dict(lp_adapters(model))[name].weight for name in ("model.embed_tokens", "lm_head"))
    assert not torch.equal(rows, heads)
    reference = written("llama", rows, heads)
    torch.testing.assert_close(model(**inputs("llama")).logits, reference(**inputs("llama")).logits)
    gradient(model, "llama")
    gradient(reference, "llama")
    torch.testing.assert_close(heads.grad, reference.lm_head.weight.grad[IDS], atol=1e-4, rtol=1e-4)
    assert [name for name, _ in lp_adapters(adapted("llama"))] == ["model.embed_tokens"]


def lp_adapters(model):
    return [(name, adapter) for name, _, _, adapter in lp.adapters(model)]


def test_tied_layers_have_one_tensor_which_copies_share_as_well(tmp_path):
    model = moved(adapted("bart"))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "model.shared.peft.trainable_tokens.weight"
    ]
    assert len(lp_adapters(model)) == 4
    y = model(**inputs("bart")).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(**inputs("bart")).logits, y)
        twin.get_parameter("model.shared.peft.trainable_tokens.weight").data.zero_()
        assert (twin(**inputs("bart")).logits - y).abs().max() > 0.1
    lp.save_adapter(model, tmp_path / "a")
    loaded = lp.load_adapter(build("bart"), tmp_path / "a")
    assert torch.equal(loaded(**inputs("bart")).logits, y)


def test_every_use_of_a_token_is_seen_in_any_shape_of_ids():
    table = nn.Embedding(50, 4)
    net = lp.inject(nn.Sequential(table), lp.TrainableTokens(tokens=[49, 0, 7, 7]))
    rows = moved(net)[0].peft["trainable_tokens"].weight
    weight = table.weight.detach().clone()
    weight[[0, 7, 49]] = rows.detach()
    for ids in (
        torch.arange(50),
        torch.randint(50, (2, 3, 4)),
        torch.tensor(7),
        torch.tensor([[49]], dtype=torch.int32),
    ):
        assert torch.equal(net(ids), F.embedding(ids, weight))


def test_padding_gets_no_gradient_and_keeps_an_imported_row():
    net = lp.inject(nn.Sequential(nn.Embedding(9, 4, padding_idx=0)), lp.TrainableTokens(tokens=[0, 3]))
    rows = moved(net)[0].peft["trainable_tokens"].weight
    y = net(torch.tensor([0, 3, 3, 1]))
    torch.testing.assert_close(y[:3], rows[[0, 1, 1]])
    y.sum().backward()
    assert torch.equal(rows.grad, torch.tensor([[0.0] * 4, [2.0] * 4]))


def test_adapters_take_turns_and_rows_of_a_batch_have_their_own():
    model = lp.inject(build("tied"), [lp.LoRA(targets=["q_proj"]), lp.TrainableTokens(tokens=IDS)])
    x = inputs("tied")
    with torch.no_grad():
        base = build("tied")(**x).logits
        lp.add_adapter(model, lp.TrainableTokens(name="other", tokens=[IDS[0], 60]))
        for name, value in (("trainable_tokens", 0.2), ("other", -0.3)):
            for _, _, key, adapter in lp.adapters(model):
                for p in adapter.parameters() if key == name else ():
                    p.add_(value)
        alone = {}
        for name in ("trainable_tokens", "other"):
            lp.activate(model, name)
            alone[name] = model(**x).logits
        with lp.disabled(model):
            torch.testing.assert_close(model(**x).logits, base)
        with lp.row_adapters(model, ["other", "trainable_tokens"]):
            mixed = model(**x).logits
    torch.testing.assert_close(
        mixed, torch.stack([alone["other"][0], alone["trainable_tokens"][1]]), atol=1e-4, rtol=1e-4
    )
    assert (alone["other"] - alone["trainable_tokens"]).abs().max() > 1
    with pytest.raises(ValueError, match="cannot share it"):
        lp.activate(model, "trainable_tokens", "other")


def test_tokens_are_given_as_text_and_stored_as_ids():
    words = tokenizer()
    method = lp.TrainableTokens(tokens=["w40", 5, "w11"], tokenizer=words)
    assert (method.tokens, method.tokenizer) == (IDS, "")
    with pytest.raises(ValueError, match="tokens must be in the tokenizer's vocabulary.*got 'w99'"):
        lp.TrainableTokens(tokens=["w99"], tokenizer=words)


def test_a_folder_of_a_tokenizer_will_do(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    assert lp.TrainableTokens(tokens=["w7"], tokenizer=str(tmp_path)).tokens == [7]


@pytest.mark.parametrize("tokens", [[], "w7", [-1], [1.5], [True]])
def test_what_is_no_token_is_refused(tokens):
    with pytest.raises(ValueError, match="^tokens must be"):
        lp.TrainableTokens(tokens=tokens)


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="tokenizer must be given, since tokens are text"):
        lp.TrainableTokens(tokens=["w7"])


class Keyed(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, x):
        return self.table(x)


REFUSED = {
    "no row": (nn.Embedding(5, 4), "Token 5 has no row in table, which has 5.*add_tokens.*resize_token_embeddings.6."),
    "max_norm": (nn.Embedding(9, 4, max_norm=1.0), "renormalizes its weight"),
    "frequencies": (nn.Embedding(9, 4, scale_grad_by_freq=True), "divides gradients by how often"),
    "convolution": (nn.Conv1d(9, 9, 3), "no row for each token"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_that_cannot_train_are_refused_and_nothing_changes(case):
    table, message = REFUSED[case]
    net = Keyed(copy.deepcopy(table))
    with pytest.raises((TypeError, ValueError), match=message):
        lp.inject(net, lp.TrainableTokens(tokens=[5], targets=["table"]))
    assert type(net.table) is type(table)


def test_another_adapter_on_the_same_layer_is_refused_in_either_order():
    for methods in ([0, 1], [1, 0]):
        both = [lp.TrainableTokens(tokens=IDS), lp.LoRA(targets=["embed_tokens"])]
        with pytest.raises(ValueError, match="cannot share it"):
            lp.inject(build("llama"), [both[i] for i in methods])


def test_a_model_of_several_tables_asks_for_targets():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Embedding(9, 4))
    with pytest.raises(ValueError, match="targets must be globs of embeddings, since the model has 2"):
        lp.inject(net, lp.TrainableTokens(tokens=[3]))
    lp.inject(net, lp.TrainableTokens(tokens=[3], targets=["1"]))
    assert [name for name, _ in lp_adapters(net)] == ["1"]


def test_a_quantized_head_is_refused():
    model = lp.quantize(build("llama"), "int8", ["lm_head"])
    with pytest.raises(TypeError, match="lm_head .* is stored in few bits"):
        lp.inject(model, lp.TrainableTokens(tokens=IDS, output_head=True))
    lp.inject(model, lp.TrainableTokens(tokens=IDS))
    assert moved(model)(**inputs("llama")).logits.isfinite().all()


def test_kept_weights_need_untied_ones():
    with pytest.raises(ValueError, match="shares a parameter"):
        lp.merge(moved(adapted("tied")), keep=True)
    model, x = moved(adapted("llama")), inputs("llama")
    y, base = model(**x).logits, build("llama").get_input_embeddings().weight
    with lp.merged(model):
        torch.testing.assert_close(model(**x).logits, y)
    assert torch.equal(model.get_input_embeddings().weight, base)


def test_generation_says_the_trained_token():
    model = adapted("tied")
    with torch.no_grad():
        hidden = model.model(**inputs("tied")).last_hidden_state[:1, -1]
        dict(lp_adapters(model))["model.embed_tokens"].weight[2] = 100 * hidden[0] / hidden.norm()
    generated = model.generate(inputs("tied")["input_ids"][:1], max_new_tokens=1, do_sample=False)
    assert generated[0, -1] == IDS[2]


def test_prompts_stand_before_trained_tokens():
    model = lp.inject(build("tied"), [lp.TrainableTokens(tokens=IDS), lp.PromptTuning(length=3)])
    y = moved(model)(**inputs("tied")).logits
    rows = dict(lp_adapters(model))["model.embed_tokens"].weight
    reference = lp.inject(written("tied", rows), lp.PromptTuning(length=3))
    prompts = [{k: p for k, p in net.named_parameters() if "prompt_tuning" in k} for net in (model, reference)]
    with torch.no_grad():
        for key, prompt in prompts[1].items():
            prompt.copy_(prompts[0][key])
    torch.testing.assert_close(y, reference(**inputs("tied")).logits, atol=1e-4, rtol=1e-4)


def test_a_base_without_values_takes_them_from_a_file(tmp_path):
    model = moved(adapted("llama"))
    lp.save_adapter(model, tmp_path / "a")
    build("llama").save_pretrained(tmp_path / "base")
    with lp.without_values():
        empty = MODELS["llama"].make()
    lp.merge_files(empty, tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    from transformers import LlamaForCausalLM

    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(**inputs("llama")).logits, model(**inputs("llama")).logits)
