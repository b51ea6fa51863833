"""P-tuning: its encoder by formulas written afresh and beside peft, and pseudo tokens inside a template."""

import copy

import pytest
import torch
import torch.nn.functional as F
from installed import needs
from models import MODELS, VOCABULARY, WIDTH, cache_argument, cache_of, logits, tokens
from torch import nn

import lightning_peft as lp
from lightning_peft.methods.prompting.prompt_encoders import MLP, BiLSTM, LSTMThenMLP

pytestmark = needs("transformers")

TEMPLATE = "[P:2] {subject} [P] {object}"
COUNT = 3
ROWS = torch.tensor([[-1, -1, 5, 6, 7, -1, 8], [9, -1, 4, -1, -1, 10, 11]])
TEXT = ["bert", "distilbert", "llama", "gpt2", "t5", "bart"]


def adapted(model="llama", **settings):
    torch.manual_seed(1)
    return lp.inject(MODELS[model](), lp.PTuning(**{"template": TEMPLATE, **settings}))


def prompt_of(model):
    (adapter,) = (a for *_, a in lp.adapters(model) if hasattr(a, "prompt"))
    return adapter


def inputs(model, rows=ROWS, **more):
    decoder = {"decoder_input_ids": tokens(length=5)} if model in ("t5", "bart") else {}
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows), **decoder, **more}


@torch.no_grad()
def run(model, name, rows=ROWS, **more):
    return logits(model(**inputs(name, rows, **more)))


# The encoder


def lstm_by_gates(x, weights, hidden):
    """Two layers, each forward and backward, one token and one gate after another."""
    for layer in range(2):
        sides = []
        for way in ("", "_reverse"):
            w, u, b, c = (weights[f"{n}_l{layer}{way}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
            h, state, outputs = torch.zeros(hidden).to(x), torch.zeros(hidden).to(x), []
            for token in x.flip(0) if way else x:
                i, f, g, o = (w @ token + b + u @ h + c).chunk(4)
                state = f.sigmoid() * state + i.sigmoid() * g.tanh()
                h = o.sigmoid() * state.tanh()
                outputs.append(h)
            sides.append(torch.stack(outputs[::-1] if way else outputs))
        x = torch.cat(sides, 1)
    return x


def mlp_by_hand(x, up, down):
    return (x @ up.weight.T + up.bias).clamp(min=0) @ down.weight.T + down.bias


@pytest.mark.parametrize("hidden", [WIDTH, 2 * WIDTH, 6], ids=["LAMA", "SuperGLUE", "narrow"])
def test_the_lstm_and_its_mlp_are_what_the_paper_says(hidden):
    encoder = LSTMThenMLP(torch.empty(0), WIDTH, hidden, 0.3).double()
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    reference = nn.LSTM(WIDTH, hidden // 2, 2, bidirectional=True, batch_first=True).double()
    reference.load_state_dict(encoder.lstm.state_dict())
    h = lstm_by_gates(x, dict(encoder.lstm.named_parameters()), hidden // 2)
    torch.testing.assert_close(h, reference(x[None])[0][0])
    torch.testing.assert_close(encoder.lstm(x, False), h)
    expected = mlp_by_hand(h, encoder.mlp.up, encoder.mlp.down)
    torch.testing.assert_close(encoder(x, False), expected)
    assert expected.shape == x.shape


def test_the_mlp_alone_is_what_its_name_says():
    encoder = MLP(torch.empty(0), WIDTH, 6, WIDTH).double()
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(encoder(x, True), mlp_by_hand(x, encoder.up, encoder.down))


def test_weights_start_as_torch_starts_them():
    lstm = BiLSTM(torch.empty(0), WIDTH, 64, 0.0)
    bound = 32**-0.5
    values = torch.cat([p.detach().flatten() for p in lstm.parameters()])
    assert values.abs().max() <= bound
    assert abs(values.std() - bound / 3**0.5) < 0.01 * bound
    model = adapted(length=200, template=None)
    assert abs(prompt_of(model).prompt.std() - 1) < 0.05


def test_dropout_is_between_the_layers_of_the_lstm_and_in_training_alone():
    model = adapted(dropout=0.5)
    adapter = prompt_of(model)
    y = run(model.eval(), "llama")
    assert torch.equal(run(model, "llama"), y)
    assert not torch.equal(run(model.train(), "llama"), run(model, "llama"))
    assert torch.equal(adapter.export_state()["prompt"], adapter.export_state()["prompt"])
    torch.testing.assert_close(run(lp.finalize(model), "llama"), y)


@pytest.mark.parametrize("kind", ["lstm", "mlp"])
def test_it_computes_what_peft_computes(kind):
    """Peft's LSTM is followed by an MLP of the LSTM's width, its MLP has a third layer, set here to the identity."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours = lp.inject(MODELS["llama"](), lp.PTuning(length=4, encoder=kind))
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_reparameterization_type=kind.upper(),
        encoder_hidden_size=WIDTH // 2 if kind == "lstm" else WIDTH,
    )  # fmt: skip
    theirs = peft.get_peft_model(MODELS["llama"](), config).eval()
    adapter, encoder = prompt_of(ours), theirs.prompt_encoder["default"]
    encoder.embedding.weight.data.copy_(adapter.prompt)
    if kind == "lstm":
        encoder.lstm_head.load_state_dict(adapter.encoder.lstm.state_dict())
        up, down = encoder.mlp_head[0], encoder.mlp_head[2]
        mlp = adapter.encoder.mlp
    else:
        up, middle, down = encoder.mlp_head[0], encoder.mlp_head[2], encoder.mlp_head[4]
        middle.weight.data.copy_(torch.eye(WIDTH))
        middle.bias.data.zero_()
        mlp = adapter.encoder
    up.load_state_dict(mlp.up.state_dict())
    down.load_state_dict(mlp.down.state_dict())
    x = tokens()
    with torch.no_grad():
        y, z = ours(x).logits, theirs(x, attention_mask=torch.ones_like(x)).logits[:, 4:]
    print(f"{kind}: max difference {(y - z).abs().max():.1e}")
    torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-5)


# In a template


@pytest.mark.parametrize("name", TEXT)
def test_vectors_stand_at_placeholders_and_all_else_keeps_its_embeddings(name):
    model, base = adapted(name), MODELS[name]()
    h = prompt_of(model).export_state()["prompt"].detach()
    table = base.get_input_embeddings()
    rows = []
    for ids in ROWS:
        place = iter(h)
        rows.append(torch.stack([next(place) if i < 0 else table(i).detach() for i in ids]))
    given = inputs(name)
    given.pop("input_ids")
    with torch.no_grad():
        expected = logits(base(inputs_embeds=torch.stack(rows), **given))
    torch.testing.assert_close(run(model, name), expected, atol=1e-5, rtol=1e-5)
    assert (run(model, name) - run(MODELS[name](), name, ROWS.clamp(min=0))).abs().max() > 1e-2


def test_only_placeholders_train_the_prompt():
    """With the same vectors in place of embeddings as leaves, the gradient of h_k is the sum over rows."""
    model = adapted(encoder="none")
    adapter, table = prompt_of(model), model.get_input_embeddings()
    leaf = table(ROWS.clamp(min=0)).detach()
    leaf[ROWS < 0] = adapter.prompt.detach().repeat(2, 1)
    leaf.requires_grad_()
    MODELS["llama"]()(inputs_embeds=leaf).logits.square().sum().backward()
    model(ROWS).logits.square().sum().backward()
    expected = leaf.grad[ROWS < 0].view(2, COUNT, -1).sum(0)
    torch.testing.assert_close(adapter.prompt.grad, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_padding_does_not_matter(name, side):
    if (name, side) == ("bert", "left"):
        pytest.skip("the positions of BERT count from the first column on")
    model = adapted(name)
    sides = (3, 0) if side == "left" else (0, 3)
    rows, mask = F.pad(ROWS, sides), F.pad(torch.ones_like(ROWS), sides)
    more = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if name in ("llama", "gpt2") else {}
    y, z = run(model, name, rows, attention_mask=mask, **more), run(model, name)
    if y.shape[1:2] == (10,):
        y = y[:, 3:] if side == "left" else y[:, :7]
    torch.testing.assert_close(y, z, atol=1e-5, rtol=1e-5)


def test_positions_that_a_model_reads_off_its_ids_do_not_see_padding():
    from transformers import RobertaConfig, RobertaModel

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = RobertaModel(RobertaConfig(**sizes, intermediate_size=48, initializer_range=0.1)).eval()
    model = lp.inject(base, lp.PTuning(template=TEMPLATE))
    rows, ones = ROWS.where(ROWS != 1, 2), torch.ones_like(ROWS)
    with torch.no_grad():
        y = model(rows, attention_mask=ones)[0]
        for sides, kept in (((3, 0), slice(3, 10)), ((0, 3), slice(0, 7))):
            padded = model(F.pad(rows, sides, value=1), attention_mask=F.pad(ones, sides))[0]
            torch.testing.assert_close(padded[:, kept], y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("company", [[], [lp.LoRA(rank=2)]], ids=["alone", "with LoRA"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_generation_agrees_with_and_without_cache_and_beams(name, company):
    torch.manual_seed(1)
    model = lp.inject(MODELS[name](), [lp.PTuning(template=TEMPLATE), *company]).eval()
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter, std=0.3)
    mask = torch.ones_like(ROWS)
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(ROWS, attention_mask=mask, **settings)
    assert torch.equal(model.generate(ROWS, attention_mask=mask, use_cache=False, **settings), cached)
    beams = model.generate(ROWS, attention_mask=mask, num_beams=3, **settings)
    assert torch.equal(model.generate(ROWS, attention_mask=mask, num_beams=3, use_cache=False, **settings), beams)
    if name == "llama":  # each step is the most likely token of the row so far
        row = ROWS
        for _ in range(6):
            step = run(model, name, row)[:, -1]
            step[:, model.generation_config.eos_token_id] = -torch.inf
            row = torch.cat([row, step.argmax(-1, keepdim=True)], 1)
        assert torch.equal(row, cached)


def test_repetition_is_penalized_with_a_placeholder_of_the_vocabulary():
    model = adapted(placeholder=VOCABULARY - 1).eval()
    rows = ROWS.where(ROWS >= 0, VOCABULARY - 1)
    assert torch.equal(run(model, "llama", rows), run(adapted().eval(), "llama"))
    out = model.generate(rows, attention_mask=torch.ones_like(rows), repetition_penalty=1.5, max_new_tokens=3)
    assert out.shape[1] == 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("encoder", ["lstm", "mlp", "none"])
def test_it_compiles_whole_and_refuses_wrong_rows_there_too(encoder, name):
    torch._dynamo.reset()
    model = adapted(name, encoder=encoder)
    y = logits(model(ROWS))
    weights = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(y.square().sum(), weights)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    z = logits(compiled(ROWS))
    torch.testing.assert_close(z, y, atol=1e-5, rtol=1e-5)
    found = torch.autograd.grad(z.square().sum(), weights)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(RuntimeError, match="another number of placeholders"):
        compiled(ROWS.clamp(min=0))
    with torch.no_grad():
        torch.testing.assert_close(logits(compiled(ROWS)), y, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    results = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(ROWS).logits.square().mean().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-5)


# Final form, files, counts


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_the_final_form_and_its_file_hold_the_vectors_alone(name, encoder, tmp_path):
    model = adapted(name, encoder=encoder, hidden_size=8)
    y = run(model, name)
    lp.save_adapter(model, tmp_path)
    keys = {tensor["key"]: tensor["shape"] for tensor in lp.inspect_adapter(tmp_path)["tensors"]}
    assert list(keys.values()) == [[COUNT, WIDTH]]
    assert next(iter(keys)).endswith("peft.p_tuning.prompt")
    fresh = lp.load_adapter(MODELS[name](), tmp_path)
    assert torch.equal(run(fresh, name), y)
    twin = copy.deepcopy(model)
    assert torch.equal(run(lp.finalize(model), name), y)
    assert lp.summary(model).trainable == COUNT * WIDTH
    assert torch.equal(run(twin, name), y)


def test_an_lstm_has_as_many_parameters_as_written_down():
    h, n = WIDTH, COUNT
    assert lp.summary(adapted()).trainable == n * h + 14 * h * h + 18 * h
    assert lp.summary(adapted(encoder="mlp")).trainable == n * h + 2 * (h * h + h)
    assert lp.summary(adapted(encoder="none")).trainable == n * h


def test_an_encoder_stays_wide_in_a_narrow_model():
    model = adapted().bfloat16()
    assert {p.dtype for *_, a in lp.adapters(model) for p in a.parameters()} == {torch.float32}
    assert run(model, "llama").dtype == torch.bfloat16


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "length must be given, or else a template"),
        ({"length": 3, "template": "[P]"}, "length must be given, or else a template"),
        ({"length": 0}, "length must be a positive whole number"),
        ({"template": "no pseudo token {x}"}, "template must be one with pseudo tokens"),
        ({"template": "[P:0] {x}"}, "no number of pseudo tokens"),
        ({"length": 3, "encoder": "gru"}, "encoder must be"),
        ({"length": 3, "hidden_size": 0}, "hidden_size must be a positive whole number"),
        ({"length": 3, "dropout": 1.0}, "dropout must be from 0"),
        ({"length": 3, "encoder": "mlp", "dropout": 0.1}, "dropout must be 0 with this encoder"),
        ({"template": "[P]", "targets": ["a"], "embeddings": "b"}, "targets must be absent"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        lp.PTuning(**settings)


@pytest.mark.parametrize("name", TEXT)
def test_rows_with_another_number_of_placeholders_are_refused(name):
    model = adapted(name)
    with pytest.raises(ValueError, match=r"0 placeholders \(id -1\), but .*\[P:2\].* 3 .* build rows with .*Template"):
        run(model, name, ROWS.clamp(min=0))
    rows = ROWS.clone()
    rows[1, 0] = -1
    with pytest.raises(ValueError, match=r"4 placeholders .* 3 pseudo tokens"):
        run(model, name, rows)


def test_a_row_that_is_continued_may_have_all_placeholders_or_none():
    model = adapted()
    with torch.no_grad():
        whole = model(torch.cat([ROWS, tokens(2, 3)], 1)).logits
        first = model(ROWS, use_cache=True)
        rest = model(tokens(2, 3), **{cache_argument(model): cache_of(first)}).logits
    torch.testing.assert_close(rest, whole[:, 7:], atol=1e-5, rtol=1e-5)
    cache = cache_of(model(ROWS, use_cache=True))
    with pytest.raises(ValueError, match="1 placeholders"):
        model(torch.tensor([[-1], [4]]), **{cache_argument(model): cache})


def test_embedded_rows_are_refused():
    model = adapted()
    with pytest.raises(ValueError, match="needs input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, WIDTH))


@pytest.mark.parametrize("name", ["vit", "fused_vit"])
def test_a_model_without_tokens_is_refused(name):
    with pytest.raises((TypeError, ValueError), match="give the method targets"):
        lp.inject(MODELS[name](), lp.PTuning(template=TEMPLATE))


def test_an_lstm_with_halves_of_unequal_width_is_refused():
    with pytest.raises(ValueError, match="hidden_size must be even, as half of it"):
        adapted(hidden_size=5)
    assert lp.summary(adapted(encoder="mlp", hidden_size=5)).trainable == (COUNT + 5 * 2 + 1) * WIDTH + 5
