"""KronA beside feed-forward blocks: where they are found, and what runs beside them."""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, logits, tokens
from single_layers import fill
from torch import nn

import lightning_peft as lp
from lightning_peft.core.adapter_folder import read_adapter
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
    assert (found[0].up, found[0].name, len(found)) == (up, down, count)
    assert len({(block.up, block.name) for block in found}) == count


def test_a_lone_up_projection_belongs_to_no_block():
    model = nn.ModuleDict({"fc1": nn.Linear(3, 8), "body": MODELS["plain"]().trunk.blocks[0]})
    (block,) = feedforward_blocks(model, ["feedforward"])
    assert (block.up, block.name) == ("body.fc1", "body.fc2")


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
    assert all(tap.captured.x is None for tap in taps(model))
    alive = weakref.ref(seen.pop())
    assert alive() is None


def test_a_failed_call_leaves_nothing_that_a_copy_would_take():
    model = filled(MODELS["bert"](), lp.KronABlock())
    layer = model.bert.encoder.layer[0]
    layer.intermediate(torch.randn(1, 2, 32).requires_grad_() * 2)  # its down-projection is never called
    assert taps(model)[0].captured.x is not None
    twin = copy.deepcopy(model)
    assert taps(twin)[0].captured.x is None
    assert taps(twin)[0].captured is twin.bert.encoder.layer[0].output.dense.peft["krona_block"].captured
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


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("name", "targets", "block"),
    [
        ("llama", ["mlp"], lambda m: (m.model.layers[1].mlp, m.model.layers[1].mlp)),
        ("llama", ["feedforward"], lambda m: (m.model.layers[1].mlp, m.model.layers[1].mlp.down_proj)),
        ("gpt2", ["mlp"], lambda m: (m.transformer.h[1].mlp, m.transformer.h[1].mlp)),
        ("plain", ["feedforward"], lambda m: (lambda x: b1(m).fc2(F.relu(b1(m).fc1(x))), b1(m).fc2)),
        ("bert", ["feedforward"], lambda m: (lambda x: b1(m).output.dense(b1(m).intermediate(x)), b1(m).output.dense)),
    ],
    ids=["llama mlp", "llama", "gpt2 mlp", "plain", "bert"],
)
def test_krona_beside_a_block_is_the_papers_sum(name, targets, block, residual):
    model = fill(lp.inject(MODELS[name](), lp.KronABlock(scale=3, targets=targets, residual=residual))).double()
    run, host = block(model)
    run_base, _ = block(MODELS[name]().double())
    adapter = host.peft["krona_block"]
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    trained = [adapter.a, adapter.b, *([adapter.residual] if residual else [])]
    y = run(x)
    fresh = [t.detach().clone().requires_grad_() for t in trained]
    expected = run_base(x) + 3 * x @ torch.kron(fresh[0], fresh[1])
    if residual:
        expected = expected + fresh[2] * x
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), [x, *trained]), torch.autograd.grad(expected.square().sum(), [x, *fresh])
    )


def b1(model):
    """The second block of two of the models."""
    return model.trunk.blocks[1] if hasattr(model, "trunk") else model.bert.encoder.layer[1]
