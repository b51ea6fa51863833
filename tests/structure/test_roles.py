"""Where feed-forward blocks are found, and what runs beside them; and the shapes of Kronecker factors."""

import copy
import weakref

import pytest
import torch
from models import MODELS, logits, tokens
from torch import nn

import lightning_peft as lp
from lightning_peft.core.adapter_folder import read_adapter
from lightning_peft.methods.families.kronecker import shape_of_a
from lightning_peft.methods.families.parallel_branch import InputCapture, feedforward_blocks


def small(name):
    import transformers as t

    made = {
        "opt": lambda: t.OPTModel(
            t.OPTConfig(vocab_size=8, hidden_size=8, ffn_dim=12, num_hidden_layers=2, num_attention_heads=2,
                        word_embed_proj_dim=8)
        ),
        "bart": lambda: t.BartModel(
            t.BartConfig(vocab_size=8, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=12,
                         decoder_ffn_dim=12, encoder_attention_heads=2, decoder_attention_heads=2)
        ),
        "t5": lambda: t.T5Model(
            t.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2,
                       feed_forward_proj="gated-gelu")
        ),
        "distilbert": lambda: t.DistilBertModel(
            t.DistilBertConfig(vocab_size=8, dim=8, hidden_dim=12, n_layers=2, n_heads=2)
        ),
        "torch": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True), 2),
    }  # fmt: skip
    return made[name]() if name in made else MODELS[name]()


PAIRS = {
    "bert": ("bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense", 3),
    "llama": ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj", 3),
    "gpt2": ("transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj", 3),
    "plain": ("trunk.blocks.0.fc1", "trunk.blocks.0.fc2", 3),
    "opt": ("decoder.layers.0.fc1", "decoder.layers.0.fc2", 2),
    "bart": ("encoder.layers.0.fc1", "encoder.layers.0.fc2", 2),
    "t5": ("encoder.block.0.layer.1.DenseReluDense.wi_0", "encoder.block.0.layer.1.DenseReluDense.wo", 2),
    "distilbert": ("transformer.layer.0.ffn.lin1", "transformer.layer.0.ffn.lin2", 2),
    "torch": ("layers.0.linear1", "layers.0.linear2", 2),
}


@pytest.mark.parametrize("name", PAIRS)
def test_each_block_is_found_once_by_its_layers(name):
    found = feedforward_blocks(small(name), ["feedforward"])
    up, down, count = PAIRS[name]
    assert (found[0].tap, found[0].name, len(found)) == (up, down, count)
    assert len({(block.tap, block.name) for block in found}) == count


def test_a_lone_up_projection_belongs_to_no_block():
    model = nn.ModuleDict({"fc1": nn.Linear(3, 8), "body": MODELS["plain"]().trunk.blocks[0]})
    (block,) = feedforward_blocks(model, ["feedforward"])
    assert (block.tap, block.name) == ("body.fc1", "body.fc2")


def test_an_excluded_module_excludes_the_blocks_inside():
    blocks = feedforward_blocks(MODELS["llama"](), ["feedforward"], ["layers.1"])
    assert [block.name for block in blocks] == ["model.layers.0.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    assert len(feedforward_blocks(MODELS["llama"](), ["layers.0.mlp", "feedforward"])) == 4
    with pytest.raises(TypeError, match="write \\['mlp'\\]"):
        lp.inject(MODELS["llama"](), lp.KronABlock(targets="mlp"))


def filled(model, method):
    lp.inject(model, method)
    torch.manual_seed(3)
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def taps(model):
    return [adapter for *_, adapter in lp.adapters(model) if isinstance(adapter, InputCapture)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_both_ways_to_name_a_block_agree(name):
    one, two = (filled(MODELS[name](), lp.KronABlock(targets=[target])) for target in ("mlp", "feedforward"))
    torch.testing.assert_close(logits(one(tokens())), logits(two(tokens())))
    assert lp.summary(one).trainable == lp.summary(two).trainable


def test_a_tap_lets_go_of_the_input():
    model = filled(MODELS["bert"](), lp.KronABlock())
    seen = []
    model.bert.encoder.layer[0].intermediate.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        logits(model(tokens()))
    assert all(tap.held.x is None for tap in taps(model))
    alive = weakref.ref(seen.pop())
    assert alive() is None


def test_a_failed_call_leaves_nothing_that_a_copy_would_take():
    model = filled(MODELS["bert"](), lp.KronABlock())
    layer = model.bert.encoder.layer[0]
    layer.intermediate(torch.randn(1, 2, 32).requires_grad_() * 2)  # its down-projection is never called
    assert taps(model)[0].held.x is not None
    twin = copy.deepcopy(model)
    assert taps(twin)[0].held.x is None
    assert taps(twin)[0].held is twin.bert.encoder.layer[0].output.dense.peft["krona_block"].held
    torch.testing.assert_close(logits(twin(tokens())), logits(model(tokens())))
    with pytest.raises(RuntimeError, match="ran without its up-projection"):
        layer.output.dense(torch.randn(1, 2, 48))


def test_a_block_called_twice_uses_each_input():
    block = filled(MODELS["plain"]().trunk.blocks[0], lp.KronABlock(scale=2)).double()
    base = MODELS["plain"]().trunk.blocks[0].double()
    a, b = (block.fc2.peft["krona_block"].get_parameter(name) for name in "ab")
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    expected = x
    for _ in range(2):
        middle = expected + base.attention(base.norm(expected))
        expected = base(expected) + 2 * middle @ torch.kron(a, b)
    torch.testing.assert_close(block(block(x)), expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    "method",
    [lp.KronABlock(residual=True), lp.KronA(targets=["linear1", "self_attn"], shape_a=[8, 4])],
    ids=["block", "weights"],
)
def test_torchs_encoder_is_adapted_in_both_modes(method):
    torch.manual_seed(0)
    encoder, x = small("torch").eval(), torch.randn(2, 2, 8)  # few tokens, so that updates are added to outputs
    padding = torch.tensor([[False, False], [False, True]])
    with torch.no_grad():
        base = encoder(x, src_key_padding_mask=padding)[~padding]
        filled(encoder, method)
        y = encoder(x, src_key_padding_mask=padding)[~padding]
        assert (y - base).abs().max() > 1e-2
        torch.testing.assert_close(encoder.train()(x, src_key_padding_mask=padding)[~padding], y)


def test_krona_adapts_weights_that_torchs_attention_reads():
    torch.manual_seed(0)
    encoder, x = small("torch"), torch.randn(2, 5, 8)
    base = copy.deepcopy(encoder)
    filled(encoder, lp.KronA(targets=["attention.query", "attention.output"], scale=2))
    expected = copy.deepcopy(base)
    for name, _, _, adapter in lp.adapters(encoder):
        layer = expected.get_submodule(name)
        weight = layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight
        weight.data[slice(*adapter.rows)] += 2 * torch.kron(adapter.a.detach(), adapter.b.detach()).T
    torch.testing.assert_close(encoder(x), expected(x))
    assert (encoder(x) - base(x)).abs().max() > 1e-2
    torch.testing.assert_close(lp.merge(encoder)(x), expected(x))


@pytest.mark.parametrize("target", ["mlp", "feedforward"])
def test_merging_is_refused_with_the_reason(target):
    model = lp.inject(MODELS["llama"](), lp.KronABlock(targets=[target]))
    with pytest.raises(TypeError, match="cannot be merged: the feed-forward block is not linear"):
        lp.merge(model)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "compiled"])
def test_a_sequential_block_does_not_call_its_adapter(compiled):
    make = lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))  # noqa: E731
    model = filled(make(), lp.KronABlock(targets=["0"], exclude=["0.*"], scale=2))
    base = make()
    base.load_state_dict(model.state_dict(), strict=False)
    x = torch.randn(3, 4)
    a, b = model[0].peft["krona_block"].parameters()
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    torch.testing.assert_close(call(x), base(x) + 2 * x @ torch.kron(a, b))
    assert len(model[0]) == 3
    assert model[0][-1] is list(model[0])[-1]
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert torch.equal(lp.detach(model)(x), base(x))
    assert len(model[0]) == 3


def test_a_block_that_returns_several_things_is_refused():
    class Routed(nn.Sequential):
        def forward(self, x):
            return super().forward(x), None

    model = nn.Sequential(Routed(nn.Linear(4, 8), nn.Linear(8, 4)))
    lp.inject(model, lp.KronABlock(targets=["0"], exclude=["0.*"]))
    with pytest.raises(TypeError, match="Routed returns a tuple"):
        model(torch.randn(2, 4))


def test_taps_are_in_no_file_and_no_count(tmp_path):
    model = filled(MODELS["bert"](), lp.KronABlock(residual=True))
    assert len(list(lp.adapters(model))) == 6
    (row,) = lp.summary(model).rows
    assert row == ("KronABlock (krona_block)", 3, 3 * (2 * 32 + 1))
    lp.save_adapter(model, tmp_path)
    keys = read_adapter(tmp_path)[1]
    assert len(keys) == 9
    assert all(".output.dense.peft.krona_block." in key for key in keys)
    assert torch.equal(logits(lp.load_adapter(MODELS["bert"](), tmp_path)(tokens())), logits(model(tokens())))


def test_shapes_need_the_fewest_parameters_and_have_the_highest_rank():
    def count(a1, a2, inputs, outputs):
        return a1 * a2 + inputs // a1 * (outputs // a2)

    for inputs, outputs in ((768, 768), (768, 3072), (4096, 11008), (30522, 384), (7, 13), (1, 6)):
        a1, a2 = shape_of_a("x", inputs, outputs, None, None)
        pairs = [
            (i, j) for i in range(1, inputs + 1) if inputs % i == 0 for j in range(1, outputs + 1) if outputs % j == 0
        ]
        assert count(a1, a2, inputs, outputs) == min(count(*pair, inputs, outputs) for pair in pairs)
    assert shape_of_a("x", 768, 768, None, None) == (32, 24)
    assert shape_of_a("x", 768, 768, None, 20) == (16, 16)
    assert shape_of_a("x", 30522, 7, None, 5) == (3, 1)
