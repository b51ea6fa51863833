"""Prompts of several tasks in one batch, where they start, how they vote, and MPT's products."""

import functools
import importlib.util
import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from models import MODELS, VOCABULARY, WIDTH, list_of_blocks, logits, tokens
from sampling import diagonal
from torch import nn
from trainer_models import Module, trainer

import lightning_peft as lp
from lightning_peft.core.adapter_folder import read_adapter

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
TEXTS = [name for name, model in MODELS.items() if model.reads != "images"]
IMAGES = [name for name, model in MODELS.items() if model.reads == "images"]
METHODS = [lp.PromptTuning, lp.MultitaskPromptTuning]
IDS = torch.tensor([2, 0])


def place(name):
    return {"targets": ["trunk"], "embeddings": "embed"} if name in ("plain", "encoder") else {}


def adapted(name, method=lp.PromptTuning, **settings):
    model = lp.inject(MODELS[name](), method(**{"length": 3, "tasks": 3, **settings}, **place(name)))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in prompts(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def prompts(model):
    return {key: p for *_, adapter in lp.adapters(model) for key, p in adapter.named_parameters()}


def gradients(model, y):
    return dict(
        zip(prompts(model), torch.autograd.grad(y.double().square().sum(), prompts(model).values()), strict=True)
    )


def padded(name, side):
    """Two rows of which the first has three columns of padding."""
    inputs = MODELS[name].inputs()
    x, mask = inputs["input_ids"], inputs["attention_mask"].clone()
    columns = slice(0, 3) if side == "left" else slice(4, 7)
    mask[0, columns] = 0
    inputs["attention_mask"], alone = mask, {**inputs, "input_ids": x[:1, mask[0].bool()]}
    if MODELS[name].positions == "given":
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    rows = [{k: v[:1] for k, v in alone.items()}, {k: v[1:] for k, v in inputs.items()}]
    rows[0]["attention_mask"] = torch.ones_like(rows[0]["input_ids"])
    return inputs, rows, mask.bool()


PADDED = [(n, s) for n in TEXTS for s in ("left", "right") if s == "right" or MODELS[n].positions != "absolute"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "side"), PADDED)
def test_a_batch_of_several_tasks_equals_its_rows_one_by_one(name, side, method):
    model = adapted(name, method).train()
    inputs, rows, mask = padded(name, side)
    with lp.row_tasks(model, IDS):
        y = logits(model(**inputs))
    one_by_one = []
    for row, task in zip(rows, IDS.tolist(), strict=True):
        with lp.row_tasks(model, task):
            one_by_one.append(logits(model(**row)))
    per_token = y.dim() == 3 and y.shape[1] == 7
    kept = [y[row][mask[row]] if per_token else y[row] for row in range(2)]
    for found, expected in zip(kept, one_by_one, strict=True):
        torch.testing.assert_close(found, expected[0], atol=1e-5, rtol=1e-5)
    found = gradients(model, torch.cat([x.flatten() for x in kept]))
    expected = gradients(model, torch.cat([x.flatten() for x in one_by_one]))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    of_tasks = {"u", "v"} if method is lp.MultitaskPromptTuning else {"prompt"}
    for key in of_tasks:
        assert found[key][1].abs().sum() == 0  # the absent task
        assert (found[key][IDS].flatten(1).abs().sum(1) > 0).all()


@diagonal(("name", "method"), ["llama", "gpt2", "t5", "bart"], METHODS)
def test_a_batch_of_several_tasks_generates_what_its_rows_do(name, method):
    model = adapted(name, method)
    inputs, rows, _ = padded(name, "right" if name == "bart" else "left")

    def generate(row, task, **more):
        settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
        with lp.row_tasks(model, task):
            given = {key: row[key] for key in ("input_ids", "attention_mask")}
            output = model.generate(**given, **settings, **more, output_logits=True)
        return output.sequences[:, -5:], torch.stack(output.logits, 1)

    beams = {"num_beams": 3, "num_return_sequences": 2}
    for more in ({}, {"use_cache": False}, beams, {**beams, "use_cache": False}):
        words, values = generate(inputs, IDS, **more)
        size = len(words) // 2
        for row, task in enumerate(IDS.tolist()):
            expected, logits_alone = generate(rows[row], task, **more)
            assert torch.equal(words[row * size : (row + 1) * size], expected)
            if not more:
                torch.testing.assert_close(values[row], logits_alone[0], atol=1e-4, rtol=1e-4)
                assert (values[row] - generate(rows[row], 1)[1][0]).abs().max() > 1e-2


def test_contexts_nest_and_leave_what_was_before():
    model = adapted("llama")
    x = tokens()

    def run(task):
        with lp.row_tasks(model, task), torch.no_grad():
            return model(x).logits

    expected = [run(task) for task in range(3)]
    with torch.no_grad(), lp.row_tasks(model, 0):
        with lp.row_tasks(model, 2):
            assert torch.equal(model(x).logits, expected[2])
        assert torch.equal(model(x).logits, expected[0])
        with pytest.raises(ZeroDivisionError), lp.row_tasks(model, 1):
            raise ZeroDivisionError
        assert torch.equal(model(x).logits, expected[0])
    with pytest.raises(RuntimeError, match="with lightning_peft.row_tasks"):
        model(x)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_gradient_checkpointing_recomputes_right_outside_of_the_context(name, reentrant):
    results = []
    for checkpointing in (False, True):
        model = adapted(name, lp.MultitaskPromptTuning).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with lp.row_tasks(model, IDS):
            y = logits(model(**MODELS[name].inputs()))
        with lp.row_tasks(model, 1):  # of another batch meanwhile
            y.square().mean().backward()
        results.append({key: p.grad for key, p in prompts(model).items()})
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-5)


def test_a_backbone_that_is_recomputed_as_a_whole_has_the_tasks_of_its_forward():
    model, results = adapted("llama").train(), []
    for run in (lambda f, x: f(x), functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)):
        with lp.row_tasks(model, IDS):
            y = run(lambda x: model(x).logits, tokens())
        model.zero_grad()
        with lp.row_tasks(model, 1):
            y.square().sum().backward()
        results.append({key: p.grad.clone() for key, p in prompts(model).items()})
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_compiles_whole_and_only_once_for_all_tasks(name, method):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = adapted(name, method)
    count = CompileCounterWithBackend("aot_eager" if name == "llama" else "eager")  # which is faster, for the larger
    compiled = torch.compile(model, fullgraph=True, backend=count)
    for ids in (IDS, torch.tensor([1, 1]), torch.tensor([0, 2])):
        with lp.row_tasks(model, ids):
            y, z = (logits(m(**MODELS[name].inputs())) for m in (model, compiled))
        torch.testing.assert_close(z, y, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradients(model, z), gradients(model, y), atol=1e-3, rtol=1e-3)
    assert count.frame_count == 1


WRONG = {
    "too large": (torch.tensor([0, 3]), ValueError, "0 to 2.*got \\[0, 3\\]"),
    "negative": (-1, ValueError, "0 to 2"),
    "none": (torch.tensor([], dtype=torch.long), ValueError, "at least one"),
    "floats": (torch.tensor([1.0]), TypeError, "torch.float32"),
    "two dimensions": (torch.tensor([[1]]), TypeError, "shape \\(rows,\\)"),
    "bool": (True, TypeError, "got True"),
    "list": ([0, 1], TypeError, "got \\[0, 1\\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_ids_that_cannot_be_are_refused_at_once(case):
    ids, error, said = WRONG[case]
    model = adapted("llama")
    with pytest.raises(error, match=said), lp.row_tasks(model, ids):
        raise AssertionError


def test_ids_that_do_not_fit_name_both_numbers():
    model = adapted("llama")
    with pytest.raises(ValueError, match="2 task ids were given; the batch has 3 rows"), lp.row_tasks(model, IDS):
        model(tokens(rows=3))
    one = adapted("llama", tasks=1)
    with pytest.raises(ValueError, match="No adapter of the model holds several tasks"), lp.row_tasks(one, 0):
        raise AssertionError


class Mixed(Module):
    """Trains rows of three tasks, of which a batch has two."""

    def training_step(self, batch, index):
        with lp.row_tasks(self, torch.tensor([0, 2])):
            return super().training_step(batch, index)


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Be aware that when using")
@pytest.mark.parametrize("method", METHODS)
def test_training_with_rows_of_several_tasks_resumes_bit_for_bit(method, tmp_path):
    def run(epochs, *callbacks, path=None):
        pl.seed_everything(7, verbose=False)
        net = Mixed()
        strategy = lp.PEFTStrategy(method(length=3, tasks=3), show_summary=False)
        rows = torch.randint(3, VOCABULARY, (16, 7), generator=torch.Generator().manual_seed(0))
        data = torch.utils.data.DataLoader(rows, batch_size=2)
        trainer(strategy, *callbacks, epochs=epochs).fit(net, data, ckpt_path=path)
        return net

    whole = run(2)
    run(1, ModelCheckpoint(tmp_path, save_last=True))
    resumed = run(2, path=tmp_path / "last.ckpt")
    assert prompts(whole).keys() == prompts(resumed).keys()
    assert all(torch.equal(value, prompts(resumed)[key]) for key, value in prompts(whole).items())
    lp.save_adapter(whole, tmp_path / "adapter")
    fresh = lp.load_adapter(MODELS["llama"](), tmp_path / "adapter")
    with torch.no_grad(), lp.row_tasks(fresh, IDS), lp.row_tasks(whole, IDS):
        assert torch.equal(fresh(tokens()).logits, whole.net.eval()(tokens()).logits)


@pytest.fixture
def words(tmp_path):
    """A folder with a tokenizer of whole words, ids from 10 on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 1} | {word: 10 + i for i, word in enumerate(["very", "good", "bad", "neither", "nor"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "words")
    return str(tmp_path / "words")


def started(name="llama", method=lp.PromptTuning, **settings):
    model = lp.inject(MODELS[name](), method(**settings))
    return prompts(model)["prompt"].detach(), MODELS[name]().get_input_embeddings().weight.detach()


@pytest.mark.parametrize("method", METHODS)
def test_labels_start_as_mean_embeddings_with_words_of_the_vocabulary_after_them(method, words):
    settings = {"init": "labels", "labels": ["very good", "bad", "neither nor"], "tokenizer": words}
    prompt, table = started(method=method, length=8, **settings)
    torch.testing.assert_close(prompt[0], (table[10] + table[11]) / 2)
    torch.testing.assert_close(prompt[1], table[12])
    torch.testing.assert_close(prompt[2], (table[13] + table[14]) / 2)
    rows = (prompt[3:, None] == table[None]).all(-1)
    assert rows.sum(1).tolist() == [1] * 5
    assert len(rows.float().argmax(1).unique()) == 5
    exact, _ = started(method=method, length=3, **settings)
    assert torch.equal(exact, prompt[:3])


def test_text_starts_as_its_embeddings_repeated_or_cut(words):
    prompt, table = started(length=5, init="text", init_text="very bad nor", tokenizer=words)
    assert torch.equal(prompt, table[[10, 12, 14, 10, 12]])
    prompt, table = started(length=2, tasks=2, init="text", init_text="very bad nor", tokenizer=words)
    assert torch.equal(prompt, table[[10, 12]].expand(2, -1, -1))


def test_each_task_starts_by_itself():
    prompt, table = started(length=6, tasks=2, init="vocabulary")
    rows = (prompt[:, :, None] == table).all(-1).float()
    assert rows.sum(-1).eq(1).all()
    first, second = rows.argmax(-1).tolist()
    assert len(set(first)) == len(set(second)) == 6
    assert first != second
    prompt, _ = started(length=50, tasks=4)
    assert prompt.abs().max() <= 0.5
    assert not torch.equal(prompt[0], prompt[1])
    assert started(length=6)[0].shape == (6, WIDTH)  # files of one task stay as they were


def test_embeddings_that_a_model_scales_start_scaled():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "vocab_size": 16, "d_model": 16}
    model = BartForConditionalGeneration(BartConfig(**sizes, **layers, scale_embedding=True))
    lp.inject(model, lp.PromptTuning(length=16, init="vocabulary"))
    norms = prompts(model)["prompt"].norm(dim=1).sort().values
    torch.testing.assert_close(norms, 4 * model.get_input_embeddings().weight.norm(dim=1).sort().values)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tasks": 0}, "tasks must be a positive"),
        ({"init": "labels"}, "labels must be given with"),
        ({"labels": ["a"]}, "labels must be given with"),
        ({"init": "labels", "labels": ["a", "b", "c"], "length": 2}, "labels must be at most 2, one for each"),
        ({"init": "labels", "labels": ["a"]}, "tokenizer must be a folder or name"),
        ({"init": "vocabulary", "length": 65}, "length must be at most 64"),
        ({"length": True, "init": "x"}, "init must be"),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", METHODS)
def test_starts_that_cannot_be_are_refused(method, settings, said):
    with pytest.raises(ValueError, match=said):
        lp.inject(MODELS["llama"](), method(**settings))


def test_a_label_without_a_token_is_refused(words):
    with pytest.raises(ValueError, match="labels must be a text with at least one token, got ' '"):
        started(init="labels", labels=["bad", " "], tokenizer=words)


@pytest.mark.parametrize("name", IMAGES)
def test_models_that_embed_no_tokens_are_refused_by_name(name):
    model = MODELS[name]()
    blocks, table = (list_of_blocks(model), "projection") if name == "vit" else ("blocks", "patch_embed*")
    refused = {
        "give the method targets": {},
        "no table|names": {"targets": [blocks], "embeddings": table},
        "'random' where targets come without embeddings": {"targets": [blocks], "init": "vocabulary"},
        "holds no linear layer": {"targets": ["*dropout" if name == "vit" else "*act"]},
    }
    for said, settings in refused.items():
        with pytest.raises((TypeError, ValueError), match=said):
            lp.inject(model, lp.PromptTuning(length=2, **settings))
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", IMAGES)
def test_in_a_list_of_blocks_a_prompt_enters_the_first_and_leaves_the_last(name):
    base, model = MODELS[name](), MODELS[name]()
    targets = [list_of_blocks(MODELS["vit"]()) if name == "vit" else "*blocks"]
    lp.inject(model, lp.PromptTuning(length=3, targets=targets))
    prompt = next(p for p in model.parameters() if p.requires_grad)
    path = targets[0].lstrip("*")
    blocks = base.get_submodule(path)
    x = torch.randn(2, 5, WIDTH)
    expected = torch.cat([prompt.expand(2, -1, -1), x], 1)
    found = x
    for block, adapted in zip(blocks, list(model.get_submodule(path).children())[: len(blocks)], strict=True):
        expected, found = block(expected), adapted(found) if name == "vit" else found
    found = found if name == "vit" else model.blocks(x)
    torch.testing.assert_close(found, expected[:, 3:])


def test_a_list_of_blocks_with_a_mask_is_refused():
    model = lp.inject(MODELS["plain"](), lp.PromptTuning(length=2, targets=["trunk.blocks"]))
    assert logits(model(tokens())).shape == (2, 7, 3)
    with pytest.raises(ValueError, match="cannot extend 'attention_mask' of a list of blocks"):
        model(tokens(), attention_mask=torch.ones(2, 7))


class TokensFirst(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, 0.0, batch_first=batch_first)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.trunk = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)


def test_an_encoder_that_takes_tokens_first_is_refused():
    with pytest.raises(TypeError, match="trunk takes \\(tokens, batch, features\\); build it with batch_first=True"):
        lp.inject(TokensFirst(False), lp.PromptTuning(**place("encoder")))


@pytest.mark.parametrize("columns", [slice(3, 5), slice(0, 2)], ids=["right", "left"])
def test_rows_that_torch_packs_have_a_prompt_too(columns):
    """With a padding mask, torch's encoder packs rows into a nested tensor in eval mode."""
    model = TokensFirst(True)
    lp.inject(model, lp.PromptTuning(length=3, **place("encoder")))
    x, padding = torch.randn(2, 5, WIDTH), torch.zeros(2, 5, dtype=torch.bool)
    padding[0, columns] = True
    with torch.no_grad():
        y = model.train().trunk(x, src_key_padding_mask=padding)
        z = model.eval().trunk(x, src_key_padding_mask=padding)
        alone = model.trunk(x[:1, ~padding[0]])
    torch.testing.assert_close(z[~padding], y[~padding], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z[0, ~padding[0]], alone[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="src_key_padding_mask must be boolean"):
        model.trunk(x, src_key_padding_mask=padding.float())
    with pytest.raises(ValueError, match="cannot extend 'mask'"):
        model.trunk(x, mask=torch.zeros(5, 5))


@pytest.mark.parametrize("name", ["RobertaModel", "MPNetModel"])
def test_positions_that_a_model_reads_off_its_ids_do_not_see_padding(name):
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, name).config_class(**sizes, intermediate_size=48, initializer_range=0.1)
    model = lp.inject(getattr(transformers, name)(config).eval(), lp.PromptTuning(length=3))
    x, ones = tokens(), torch.ones(2, 7, dtype=torch.long)
    with torch.no_grad():
        y = model(x, attention_mask=ones)[0]
        for sides, kept in (((3, 0), slice(3, 10)), ((0, 3), slice(0, 7))):
            padded = model(F.pad(x, sides, value=1), attention_mask=F.pad(ones, sides))[0]
            torch.testing.assert_close(padded[:, kept], y, atol=1e-5, rtol=1e-5)


def kept_for_backward(model, mask, **inputs):
    storages = {}

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = model(**inputs, attention_mask=mask, use_cache=False).last_hidden_state
    for x in (*model.parameters(), *model.buffers()):
        storages.pop(x.untyped_storage().data_ptr(), None)
    assert y.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_backward_keeps_no_more_than_for_a_longer_row(side):
    model, base = adapted("llama", tasks=1).model, MODELS["llama"]().model.requires_grad_(False)
    mask = torch.ones(2, 7, dtype=torch.long)
    if side != "none":
        mask[0, slice(0, 2) if side == "left" else slice(5, 7)] = 0
    found = kept_for_backward(model, mask, input_ids=tokens())
    embedded = torch.randn(2, 10, WIDTH, requires_grad=True)
    expected = kept_for_backward(base, F.pad(mask, (3, 0), value=1), inputs_embeds=embedded)
    indices = (2 * 10 + 2 * 7) * 8 if side == "left" else 0
    assert found <= expected + indices


def test_votes_are_counted_and_ties_go_to_the_larger_sum():
    def shares(*rows):
        return torch.tensor(rows).log()

    first = shares([0.5, 0.3, 0.2], [0.6, 0.4, 0.001], [0.1, 0.2, 0.7])
    second = shares([0.4, 0.35, 0.25], [0.1, 0.9, 0.001], [0.5, 0.2, 0.3])
    third = shares([0.01, 0.01, 0.98], [0.001, 0.001, 0.9], [0.4, 0.45, 0.15])
    votes = lp.majority_vote(torch.stack([first, second, third]))
    # Votes 0, 0, 2: most win, though 2 has the largest sum. Votes 0, 1, 2: sums 0.70, 1.30, 1.00. Votes 2, 0, 1: sums
    # 1.00, 0.85, 1.15.
    assert votes.tolist() == [0, 1, 2]
    two = torch.tensor([[[2.0, 1.0]], [[0.0, 0.5]]])  # one vote each; 0.731 + 0.378 against 0.269 + 0.622
    assert lp.majority_vote(two).tolist() == [0]
    assert lp.majority_vote(two.half()[:, :, None].expand(-1, 1, 4, -1)).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "encoder"])
def test_an_ensemble_is_each_task_in_one_forward(name, method):
    model = adapted(name, method)
    inputs, calls = padded(name, "right")[0], []
    model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        found = lp.ensemble(model, **inputs)
        assert len(calls) == 1
        assert len(found) == 3
        for task in range(3):
            with lp.row_tasks(model, task):
                expected = logits(model(**inputs))
            assert found[task].shape == expected.shape
            torch.testing.assert_close(found[task], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(lp.majority_vote(found[:1]), found[0].argmax(-1))


def test_an_ensemble_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="one number of tasks, got \\[\\]"):
        lp.ensemble(adapted("llama", tasks=1), input_ids=tokens())
    two = lp.inject(adapted("llama"), lp.PromptTuning(name="second", length=2, tasks=2))
    with pytest.raises(ValueError, match="one number of tasks, got \\[2, 3\\]"):
        lp.ensemble(two, input_ids=tokens())
    model = adapted("llama")
    with pytest.raises(ValueError, match="4 rows as the longest, or one, got {'attention_mask': 2}"):
        lp.ensemble(model, input_ids=tokens(rows=4), attention_mask=torch.ones(2, 7))
    with pytest.raises(TypeError, match="without logits"):
        lp.ensemble(model.model, input_ids=tokens())


def runs(tmp_path, settings, name="llama", also_train=()):
    """Write adapters as separate runs would, one for each settings."""
    folders = []
    for number, one in enumerate(settings):
        torch.manual_seed(number)
        model = lp.inject(MODELS[name](), one, also_train=also_train)
        folders.append(lp.save_adapter(model, tmp_path / str(number)))
    return folders


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_prompts_of_separate_runs_become_one_model(name, tmp_path):
    kinds = [{}, {"init": "vocabulary"}, {}]
    folders = runs(tmp_path, [lp.PromptTuning(length=4, **kind) for kind in kinds], name)
    model = lp.load_adapter(MODELS[name](), lp.join_prompts(folders, tmp_path / "joined"))
    inputs = MODELS[name].inputs()
    with torch.no_grad():
        found = lp.ensemble(model, **inputs)
        for task, folder in enumerate(folders):
            alone = logits(lp.load_adapter(MODELS[name](), folder)(**inputs))
            torch.testing.assert_close(found[task], alone, atol=1e-5, rtol=1e-5)
    assert (found[0] - found[2]).abs().max() > 1e-2
    assert read_adapter(tmp_path / "joined")[0]["methods"][0]["tasks"] == 3


def test_prompts_that_do_not_belong_together_are_not_joined(tmp_path):
    one = lp.PromptTuning(length=4)
    first, longer, lora = runs(tmp_path, [one, lp.PromptTuning(length=5), lp.LoRA(rank=2)])
    with pytest.raises(ValueError, match="At least two"):
        lp.join_prompts([first], tmp_path / "joined")
    with pytest.raises(ValueError, match="1 does not belong to .*0; \\(there, here\\): {'length': \\(4, 5\\)"):
        lp.join_prompts([first, longer], tmp_path / "joined")
    with pytest.raises(ValueError, match="only adapters of PromptTuning with one task"):
        lp.join_prompts([first, lora], tmp_path / "joined")
    (other,) = runs(tmp_path / "other", [one], "gpt2")
    with pytest.raises(ValueError, match="{'base': "):
        lp.join_prompts([first, other], tmp_path / "joined")
    (headed,) = runs(tmp_path / "headed", [one], also_train=["lm_head"])
    with pytest.raises(ValueError, match="also_train=\\['lm_head'\\]"):
        lp.join_prompts([first, headed], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_mpt_is_the_papers_product():
    model = adapted("llama", lp.MultitaskPromptTuning).double()
    base, x = MODELS["llama"]().double(), tokens()
    shared, u, v = (prompts(model)[key].detach().clone().requires_grad_() for key in ("prompt", "u", "v"))
    rows = [shared * torch.outer(u[k], v[k]) for k in IDS.tolist()]
    embedded = torch.cat([torch.stack(rows), base.get_input_embeddings()(x)], 1)
    expected = base(inputs_embeds=embedded).logits[:, 3:]
    with lp.row_tasks(model, IDS):
        y = model(x).logits
    torch.testing.assert_close(y, expected)
    found = torch.autograd.grad(y.square().sum(), [prompts(model)[key] for key in ("prompt", "u", "v")])
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), [shared, u, v]))


def test_mpt_starts_as_prompt_tuning_for_each_task():
    torch.manual_seed(3)
    one = lp.inject(MODELS["llama"](), lp.PromptTuning(length=5))
    torch.manual_seed(3)
    many = lp.inject(MODELS["llama"](), lp.MultitaskPromptTuning(length=5, tasks=4))
    assert prompts(many)["prompt"].shape == (5, WIDTH)
    with torch.no_grad(), lp.row_tasks(many, torch.tensor([3, 1])):
        ((*_, adapter),) = lp.adapters(many)
        nn.init.uniform_(prompts(one)["prompt"], -0.5, 0.5)
        prompts(many)["prompt"].copy_(prompts(one)["prompt"])
        assert torch.equal(many(tokens()).logits, one(tokens()).logits)
        assert adapter.virtual(2).std().item() == pytest.approx(math.sqrt(1 / 12), rel=0.15)


def learned(tmp_path, **settings):
    model = adapted("llama", lp.MultitaskPromptTuning, **settings)
    return model, str(lp.save_adapter(model, tmp_path / "source"))


def test_a_new_task_starts_from_learned_ones(tmp_path):
    source, folder = learned(tmp_path)
    target = lp.inject(MODELS["llama"](), lp.MultitaskPromptTuning(length=3, start=folder))
    old, new = prompts(source), prompts(target)
    assert torch.equal(new["prompt"], old["prompt"])
    torch.testing.assert_close(new["u"], old["u"].mean(0, keepdim=True))
    torch.testing.assert_close(new["v"], old["v"].mean(0, keepdim=True))
    two = lp.inject(MODELS["llama"](), lp.MultitaskPromptTuning(length=3, tasks=2, start=folder, name="x"))
    assert torch.equal(prompts(two)["v"], new["v"].expand(2, -1))
    written = lp.save_adapter(target, tmp_path / "target")
    (tmp_path / "source").rename(tmp_path / "away")  # no longer needed
    fresh = lp.load_adapter(MODELS["llama"](), written)
    with torch.no_grad():
        assert torch.equal(fresh(tokens()).logits, target(tokens()).logits)


def test_starts_that_do_not_fit_are_refused(tmp_path):
    _, folder = learned(tmp_path)
    with pytest.raises(ValueError, match="init must be left alone where start is given"):
        lp.MultitaskPromptTuning(init="vocabulary", start=folder)
    with pytest.raises(FileNotFoundError, match="is no adapter folder"):
        lp.inject(MODELS["llama"](), lp.MultitaskPromptTuning(start=str(tmp_path)))
    with pytest.raises(ValueError, match="length must be 3, as in"):
        lp.inject(MODELS["llama"](), lp.MultitaskPromptTuning(length=4, start=folder))
    with pytest.raises(ValueError, match="was learned on another base model"):
        lp.inject(MODELS["gpt2"](), lp.MultitaskPromptTuning(length=3, start=folder))
    with torch.device("meta"), pytest.raises(ValueError, match="no values yet"):
        lp.inject(MODELS["llama"].make(), lp.MultitaskPromptTuning(length=3, start=folder))
    other = lp.save_adapter(adapted("llama"), tmp_path / "other")
    with pytest.raises(ValueError, match="start must be the folder of an adapter of MultitaskPromptTuning alone"):
        lp.inject(MODELS["llama"](), lp.MultitaskPromptTuning(length=3, start=str(other)))


def test_a_new_task_trains_another_head_on_the_same_base(tmp_path):
    source = lp.inject(MODELS["bert"](), lp.MultitaskPromptTuning(length=3), also_train=["classifier"])
    nn.init.normal_(source.classifier.weight)
    folder = str(lp.save_adapter(source, tmp_path))
    model = lp.inject(MODELS["bert"](), lp.MultitaskPromptTuning(length=3, start=folder), also_train=["classifier"])
    assert torch.equal(prompts(model)["prompt"], prompts(source)["prompt"])


@needs_peft
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_prompts_of_several_tasks_equal_peft(name):
    import peft

    kind = "CAUSAL_LM" if name == "llama" else "SEQ_2_SEQ_LM"
    model = adapted(name, lp.MultitaskPromptTuning)
    config = peft.MultitaskPromptTuningConfig(
        task_type=kind, num_virtual_tokens=3, num_tasks=3, num_ranks=1, num_transformer_submodules=1
    )
    theirs = peft.get_peft_model(MODELS[name](), config).eval()
    encoder, inputs = theirs.prompt_encoder["default"], MODELS[name].inputs()
    if name == "t5":  # whose decoder's ids peft would drop
        inputs["labels"] = inputs.pop("decoder_input_ids")
    with torch.no_grad():
        encoder.embedding.weight.copy_(prompts(model)["prompt"])
        encoder.prefix_task_cols.copy_(prompts(model)["u"][..., None])
        encoder.prefix_task_rows.copy_(prompts(model)["v"][:, None])
        with lp.row_tasks(model, IDS):
            found = model(**inputs).logits
        expected = theirs(**inputs, task_ids=IDS).logits
    expected = expected[:, 3:] if name == "llama" else expected
    difference = (found - expected).abs().max().item()
    print(f"multitask prompt tuning, {name}: max difference {difference:.1e}")
    assert difference <= 1e-5


@needs_peft
def test_prompt_tuning_of_an_encoder_equals_peft():
    import peft

    model = adapted("t5", tasks=1)
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, num_transformer_submodules=1)
    theirs, inputs = peft.get_peft_model(MODELS["t5"](), config).eval(), MODELS["t5"].inputs()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(prompts(model)["prompt"])
        difference = (model(**inputs).logits - theirs(**inputs).logits).abs().max().item()
    print(f"prompt tuning, t5: max difference {difference:.1e}")
    assert difference <= 1e-5
