"""What a training step takes, counted without memory, against what a real one saves and against published figures."""

import dataclasses

import pytest
import torch
from cases import CASES
from models import MODELS, logits
from sampling import Laws
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightning_peft as lp
from lightning_peft.analysis.fake_model import shapes_only
from lightning_peft.analysis.memory_plan import MemoryPlan, plan_memory
from lightning_peft.analysis.plan_table import layouts, plan_text
from lightning_peft.analysis.saved_activations import saved_bytes
from lightning_peft.ops import joined_attention
from lightning_peft.quantization.meta_quantize import quantize_shapes
from lightning_peft.structure.quantized import is_quantized


def bert(width=128):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=500, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=3,
                        num_attention_heads=4)  # fmt: skip
    return BertForSequenceClassification(config)


def llama(width=128, layers=3, vocabulary=500, inner=344, heads=4, dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                         num_attention_heads=heads, use_cache=False)  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def batch_for(model, rows=8, tokens=64, device=None):
    ids = torch.ones(rows, tokens, dtype=torch.long, device=device)
    labels = ids if "CausalLM" in type(model).__name__ else ids[:, 0]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss(model, batch):
    return model(**batch).loss


def square(model, batch):
    return logits(model(**batch)).float().square().mean()


@pytest.fixture
def _as_on_a_gpu(monkeypatch):
    """Without the forms of CPUs, since planned are GPUs: oneDNN's LSTM, and the mask that short causal calls share."""
    monkeypatch.setattr(joined_attention, "MASK_LIMIT", 0)
    torch._C._set_mkldnn_enabled(False)
    yield
    torch._C._set_mkldnn_enabled(True)


def compare(model, step, batch, name):
    import harness

    before = {n: (p.data_ptr(), p.requires_grad, type(p)) for n, p in model.named_parameters()}
    measured, estimated = harness.saved_bytes(step, model, batch), saved_bytes(model, step, batch)
    print(f"{name}: {estimated:,} bytes estimated, {measured:,} measured")
    assert estimated == pytest.approx(measured, rel=0.1)
    assert {n: (p.data_ptr(), p.requires_grad, type(p)) for n, p in model.named_parameters()} == before
    return measured, estimated


@pytest.mark.usefixtures("_as_on_a_gpu")
@Laws()(lambda case: case.model in ("bert", "llama"), every=2)
def test_the_estimate_is_what_a_step_saves(case):
    model = MODELS[case.model]().train()
    lp.inject(model, case.methods)
    measured, estimated = compare(model, square, MODELS[case.model].inputs(), case)
    assert estimated == measured  # it runs the same code


@pytest.mark.slow
@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("case", [case for case in CASES if case.model not in ("bert", "llama")], ids=str)
def test_the_estimate_holds_for_other_families(case):
    model = MODELS[case.model]().train()
    lp.inject(model, case.methods)
    compare(model, square, MODELS[case.model].inputs(), case)


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_padding_is_seen(padding):
    model = MODELS["bert"]().train()
    lp.inject(model, lp.PromptTuning(length=3))
    measured, estimated = compare(model, square, MODELS["bert"].inputs(padding), padding)
    assert measured == estimated


@pytest.mark.parametrize("build", [bert, llama], ids=lambda build: build.__name__)
@pytest.mark.parametrize("method", [lp.FullFineTuning(), lp.LoRA(dropout=0.1), lp.IA3()], ids=repr)
def test_larger_models_too_with_dropout_and_labels(build, method):
    model = lp.inject(build().train(), method)
    compare(model, loss, batch_for(model), f"{type(method).__name__} on {build.__name__}")


def test_rows_that_a_mask_picks_are_counted():
    head = nn.Linear(16, 5)
    x, known = torch.randn(4, 6, 16), torch.rand(4, 6) > 0.5

    def step(model, batch):
        return model(batch["x"][batch["known"]]).square().sum() / max(1, int(batch["known"].sum()))

    compare(head, step, {"x": x.requires_grad_(), "known": known}, "mask")


def test_autocast_is_counted():
    model = lp.inject(llama().train(), lp.LoRA(targets=["all-linear"]))

    def step(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, batch)

    compare(model, step, batch_for(model), "bf16-mixed")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_quantized_base_is_counted_as_it_is_stored(kind, dtype):
    import harness

    real = lp.quantize(llama(dtype=dtype).train(), kind)
    stored = {id(x): x for m in real.modules() if hasattr(m, "weight") and is_quantized(m)
              for x in [m.weight, *m.buffers(), *state_of(m)]}  # fmt: skip
    lp.inject(real, lp.LoRA(targets=["all-linear"]))
    measured = harness.saved_bytes(loss, real, batch_for(real))
    with torch.device("meta"):
        model = llama(dtype=dtype).train()
    lp.inject(quantize_shapes(model, kind), lp.LoRA(targets=["all-linear"]))
    found = plan_memory(model, loss, {64: batch_for(model)})
    rest = sum(p.nbytes for n, p in real.named_parameters() if ".layers." not in n or "norm" in n)
    print(f"{kind}: {found.activations[64]:,} bytes estimated, {measured:,} measured; stored {found.frozen_weights:,}")
    assert found.activations[64] == pytest.approx(measured, rel=0.1)
    assert found.frozen_weights + found.buffers == pytest.approx(
        rest + sum(x.nbytes for x in stored.values()), rel=0.01
    )
    assert found.frozen == sum(p.numel() for p in llama().parameters())
    assert found.dequantized == 128 * 344 * 4


def state_of(layer):
    state = getattr(layer.weight, "quant_state", None)
    return [] if state is None else [state.absmax, state.state2.absmax]


class Live(TorchDispatchMode):
    """Follows every tensor that is made, and says how much of it lives."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
        return result

    def bytes(self, besides):
        known = {StorageWeakRef(x.untyped_storage()) for x in besides}
        return sum(size for ref, size in self.storages.items() if not ref.expired() and ref not in known)


def live_after_forward(model, batch):
    besides = [*model.parameters(), *model.buffers(), *batch.values()]
    with Live() as live:
        kept = loss(model, batch)
        found = live.bytes(besides)
    assert kept.requires_grad
    return found


@pytest.mark.parametrize("method", [lp.LoRA(), lp.FullFineTuning(), lp.LLaMAAdapter(layers=2)], ids=repr)
def test_what_lives_after_a_forward_pass_is_what_was_estimated(method):
    model = lp.inject(llama(layers=6).train(), method)
    batch = batch_for(model)
    live, estimated = live_after_forward(model, batch), saved_bytes(model, loss, batch)
    print(f"{type(method).__name__}: {estimated:,} bytes estimated, {live:,} live")
    assert estimated == pytest.approx(live, rel=0.1)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("method", [lp.LoRA(), lp.FullFineTuning()], ids=repr)
def test_checkpointed_blocks_keep_their_inputs(method):
    model = lp.inject(llama(layers=6).train(), method)
    batch = batch_for(model)
    estimated = saved_bytes(model, loss, batch, checkpointed=True)
    whole = saved_bytes(model, loss, batch)
    one = whole - saved_bytes(lp.inject(llama(layers=5).train(), method), loss, batch)  # what a block saves
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    live = live_after_forward(model, batch)
    again = one - 8 * 64 * 128 * 4  # when a block has run again, beside its input
    print(f"{type(method).__name__}: {estimated:,} bytes estimated, {live:,} live + {again:,} of one block")
    assert saved_bytes(model, loss, batch) == pytest.approx(estimated, rel=0.01)  # that it is switched on is seen
    assert all(part.gradient_checkpointing for part in model.modules() if hasattr(part, "gradient_checkpointing"))
    assert estimated == pytest.approx(live + again, rel=0.01)
    assert estimated < 0.3 * whole


def test_checkpointed_blocks_below_everything_that_trains_keep_nothing():
    deep, flat = (lp.inject(llama(layers=n).train(), lp.LLaMAAdapter(layers=2)) for n in (6, 3))
    kept = [saved_bytes(model, loss, batch_for(model), checkpointed=True) for model in (deep, flat)]
    assert kept[0] == kept[1]


PLAN = MemoryPlan(trained=10, frozen=500, adapted=True, frozen_weights=1000, trained_weights=40, buffers=7,
            gradients=40, optimizer=80, checkpoint=44, unsharded=300, dequantized=5,
            activations={16: 2000})  # fmt: skip


def test_beside_adapters_the_frozen_base_alone_is_sharded():
    assert PLAN.memory(16) == 1000 + 40 + 7 + 40 + 80 + 2000 + 5
    assert PLAN.memory(16, 4) == 1000 + 40 + 7 + 2 * 40 + 80 + 2000 + 5  # DDP sends copies of the gradients
    assert PLAN.memory(16, 4, sharded=True) == 250 + 40 + 7 + 40 + 80 + 2000 + 5 + 300
    assert PLAN.traffic(1) == PLAN.traffic(1, sharded=True) == 0
    assert PLAN.traffic(4) == 2 * 40 * 3 // 4
    assert PLAN.traffic(4, sharded=True) == (2 * 1000 + 2 * 40) * 3 // 4


def test_without_adapters_all_is_sharded():
    whole = dataclasses.replace(PLAN, adapted=False)
    assert whole.memory(16, 4) == PLAN.memory(16, 4)
    assert whole.memory(16, 4, sharded=True) == 250 + 10 + 7 + 10 + 20 + 2000 + 5 + 300
    assert whole.traffic(4, sharded=True) == (2 * 1040 + 40) * 3 // 4


def test_the_smallest_card_and_the_fewest_gpus_are_named():
    big = dataclasses.replace(PLAN, frozen_weights=60 * 2**30)
    found = {row["layout"]: row["card"] for row in layouts(big, [1, 2, 4])}
    assert found == {"one GPU": 80, "DDP x 2": 80, "FSDP x 2": 32, "DDP x 4": 80, "FSDP x 4": 16}
    text = plan_text(big, [1, 2, 4])
    assert text.endswith("Fewest GPUs for 16 tokens, by card: 16 GiB: FSDP x 4; 32 GiB: FSDP x 2; 80 GiB: one GPU.")
    assert "no layout fits" in plan_text(dataclasses.replace(PLAN, frozen_weights=10**15), [1, 2])


@pytest.mark.parametrize("method", [lp.LoRA(rank=8), lp.LastLayers(count=1)], ids=repr)
def test_what_fsdp_gathers_is_what_it_shards(method):
    with torch.device("meta"):
        model = lp.inject(llama(dtype=torch.bfloat16).train(), method)
    found = plan_memory(model, loss, {16: batch_for(model, 1, 16)})
    block = (4 * 128**2 + 3 * 128 * 344 + 2 * 128) * 2
    rest = (2 * 500 * 128 + 128) * 2
    assert found.unsharded == 2 * block + rest
    assert found.adapted == isinstance(method, lp.LoRA)
    trained = 3 * 4 * 128 * 8 * 4 if found.adapted else block + (500 * 128 + 128) * 2
    assert (found.trained_weights, found.gradients) == (trained, trained)
    assert found.frozen_weights == 3 * block + rest - (0 if found.adapted else trained)
    assert found.optimizer == found.trained * 8
    assert found.checkpoint == trained


def test_tensors_of_an_own_kind_are_refused():
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged))
    with pytest.raises(TypeError, match="NestedTensor has no plan; plan before"), shapes_only(model):
        pass


def test_code_that_reads_values_is_named():
    def step(model, batch):
        y = model(batch["x"]).sum()
        return y if float(y) > 0 else -y

    with pytest.raises(ValueError, match=r"test_memory_plan.py:\d+ asks for a value of a floating tensor") as caught:
        saved_bytes(nn.Linear(2, 2), step, {"x": torch.ones(1, 2)})
    assert isinstance(caught.value.__cause__, DataDependentOutputException)
    assert torch.backends.mkldnn.enabled
