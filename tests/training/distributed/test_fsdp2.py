"""FSDP2: a base that is sharded trains every method as one process would, and is in no checkpoint."""

import functools
import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from cases import Case, methods_for
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from models import MODELS
from parallel_laws import Keep, Rows, Task, difference, fit, gradients_alone, resumed, same_everywhere, state, whole
from processes import together
from safetensors.torch import load_file, save_model
from sampling import method_of
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.data import DataLoader, default_collate
from trainer_models import Module, data, trainer

import lightning_peft as lp
from lightning_peft.core.fingerprint import fingerprint
from lightning_peft.structure.base_model import base_parameters
from lightning_peft.training.distributed.base_weights import find_base_weights
from lightning_peft.training.distributed.sharding_plan import plan_units

FULL = lp.FSDP2Strategy
SHARDED = functools.partial(lp.FSDP2Strategy, save_distributed_checkpoint=True)
LORA = Case("llama", (lp.LoRA(rank=2),))
LAST = Case("llama", (lp.LastLayers(count=1),))
TIMED = lp.LoRA(rank=2, dropout=0.5)


class Exact(Task):
    """In float64, where differences are no rounding."""

    def training_step(self, batch, index=0):
        return super().training_step({k: v.double() if v.is_floating_point() else v for k, v in batch.items()})


class Double(pl.Callback):
    """Widens a module once its adapters are there."""

    def setup(self, trainer, pl_module, stage):
        pl_module.double()


def start():
    if not dist.is_initialized():
        dist.init_process_group("gloo")


def strategies():
    """Yield cases with how they save: both come up for each method, on BERT or LLaMA, and for each model."""
    for place, cases in enumerate((methods_for("bert"), methods_for("llama"), methods_for("fused_vit")[::3])):
        for number, case in enumerate(cases):
            yield case, (FULL, SHARDED)[(number + place) % 2]


def gradients_and_continuations(folder):
    start()
    found = []
    for number, (case, strategy) in enumerate(strategies()):
        keep = Keep()
        differing = resumed(case, strategy, Path(folder, str(number)), Double(), keep, make=Exact)
        found.append((str(case), difference(keep.gradients, gradients_alone(case)), differing))
    return found


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one_and_resume_bit_for_bit(tmp_path):
    names = [{method_of(case) for case, kind in strategies() if kind is each} for each in (FULL, SHARDED)]
    assert names[0] == names[1]
    for rank in together(gradients_and_continuations, str(tmp_path), seconds=600):
        assert len(rank) > 60
        assert max(value for _, value, _ in rank) < 1e-11, max(rank, key=lambda found: found[1])
        assert not [(name, differing) for name, _, differing in rank if differing]
        print(f"largest difference of {len(rank)} cases: {max(value for _, value, _ in rank):.1e}")


def dropout_and_clipping(folder):
    start()
    case = Case("llama", (TIMED,))
    random = [resumed(case, s, Path(folder, str(i))) for i, s in enumerate((FULL, SHARDED, "ddp"))]
    settings = {"make": Exact, "gradient_clip_val": 0.01, "accumulate_grad_batches": 2}
    heads = Case("bert", (lp.LoRA(rank=2), lp.OutputLayers()))
    steps = [state(fit(c, s, Double(), **settings)) for c in (LORA, LAST, heads) for s in (FULL, "ddp")]
    pairs = zip(steps[::2], steps[1::2], strict=True)
    return random, [difference(found, expected) for found, expected in pairs]


@pytest.mark.slow
def test_dropout_goes_on_and_clipping_sees_whole_gradients(tmp_path):
    for random, steps in together(dropout_and_clipping, str(tmp_path)):
        assert random == [[], [], []]
        assert max(steps) < 1e-9


class Wide(pl.LightningModule):
    """A base of 16.8 MB."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(4)])

    def training_step(self, batch, index):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def sizes(folder):
    start()
    found = []
    for number, strategy in enumerate((FULL, SHARDED)):
        saves = ModelCheckpoint(folder, filename=str(number))
        peft = lp.PEFTStrategy(lp.LoRA(rank=32, targets=["net.*"]), show_summary=False)
        runs = trainer(peft, saves, strategy=strategy(), devices=2, max_epochs=1)
        runs.fit(Wide(), DataLoader(torch.ones(4, 1024)))
        dist.barrier()
        path = Path(folder, f"{number}.ckpt")
        found.append(sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path])))
    return found


@pytest.mark.slow
def test_checkpoints_of_both_kinds_have_the_size_of_adapters_and_their_averages(tmp_path):
    adapter, resume_states = 4 * 2 * 32 * 1024 * 4, 2 * 12_000  # random generators and the place in the data
    for full, sharded in together(sizes, str(tmp_path)):
        assert 3 * adapter < full < 1.01 * 3 * adapter + resume_states
        assert 3 * adapter < sharded < 1.05 * 3 * adapter
        print(f"adapter {adapter:,} bytes; full checkpoint {full:,}, sharded {sharded:,}; base {4 * 1024 * 1025 * 4:,}")


def base_of(case, folder):
    torch.manual_seed(5)
    module = Task(case.model)
    if dist.get_rank() == 0:
        save_model(module.net, str(folder / "model.safetensors"))
    dist.barrier()
    return module


def read_by_unit(case, folder, quantize, **settings):
    """Return what differs between a base that was read unit by unit and one that was there, and between processes."""
    folder.mkdir(parents=True, exist_ok=True)
    expected = base_of(case, folder)
    torch.manual_seed(dist.get_rank())
    with lp.without_values():
        module = Task(case.model)
    assert all(p.is_meta for p in module.parameters())
    peft = lp.PEFTStrategy(list(case.methods), show_summary=False, quantize=quantize)
    runs = trainer(peft, strategy=FULL(base_weights=str(folder)), devices=2, max_steps=0, **settings)
    rows = Rows(case.model)
    runs.fit(module, DataLoader(rows, batch_size=2))
    if quantize:
        lp.quantize(expected, quantize, backend="torchao" if quantize == "nf4" else None)
    if settings:
        expected.to(torch.bfloat16)
    own = dict(expected.named_parameters())
    differing = [n for n, p in base_parameters(module).items() if n in own and not torch.equal(whole(p), own[n])]
    trained = [n for n, p in module.named_parameters() if p.requires_grad]
    assert fingerprint(module) == fingerprint(expected, trained)
    batch = default_collate([rows[i] for i in range(4)])
    module.training_step(batch).backward()
    if not case.starts_at_base:
        return str(case), differing, same_everywhere(state(module)), 0.0
    with torch.no_grad():
        losses = [m.eval().training_step(batch).item() for m in (module, expected)]
    return str(case), differing, same_everywhere(state(module)), losses[0] - losses[1]


def bases_read_by_unit(folder):
    start()
    random = [case for case in methods_for("llama") if not any(_reads_weights(m) for m in case.methods)]
    found = [read_by_unit(case, Path(folder, f"plain{i}"), None) for i, case in enumerate(random)]
    for kind in ("int8", "nf4"):
        cases = [Case(model, (lp.LoRA(rank=2),)) for model in ("llama", "gpt2")]
        found += [read_by_unit(case, Path(folder, f"{kind}{case}"), kind) for case in cases]
        found += [read_by_unit(case, Path(folder, f"n{kind}{case}"), kind, precision="bf16-true") for case in cases]
    return found


def _reads_weights(method):
    """Whether adapters start from weights of the base, which are not there yet; injection refuses that."""
    starts_there = isinstance(method, lp.LoRA) and (method.decompose or method.init in ("pissa", "olora"))
    return starts_there or isinstance(method, (lp.OwnParameters, lp.TrainableTokens))


@pytest.mark.slow
def test_each_process_reads_the_base_unit_by_unit_quantized_or_not(tmp_path):
    for rank in together(bases_read_by_unit, str(tmp_path)):
        assert len(rank) > 25
        assert not [found for found in rank if found[1:] != ([], [], 0.0)]


def adapters_in_and_out(folder):
    start()
    module = fit(Case("bert", (lp.LoRA(rank=2), lp.OutputLayers())), FULL)
    lp.save_adapter(module, Path(folder, "first"))
    sharded = fit(Case("bert", (lp.LastLayers(count=1),)), FULL)
    lp.save_adapter(sharded, Path(folder, "last"))
    dist.barrier()
    kept = state(module), state(sharded)
    for trained, name in ((module, "first"), (sharded, "last")):
        with torch.no_grad():
            for p in trained.parameters():
                if p.requires_grad:
                    p.mul_(0)
        lp.load_adapter(trained, Path(folder, name))
    fresh = Task("bert")
    fresh.load_state_dict({n: whole(p) for n, p in base_parameters(sharded).items()}, strict=False)
    for part in [fresh.net]:
        fully_shard(part)
    with pytest.raises(ValueError, match=r"does not fit this model: .* is sharded already, .*; inject, then shard"):
        lp.load_adapter(fresh, Path(folder, "first"))
    loaded = state(module), state(sharded)
    return [torch.equal(a[n], b[n]) for a, b in zip(kept, loaded, strict=True) for n in a]


@pytest.mark.slow
def test_adapters_come_out_of_sharded_models_and_go_in_again(tmp_path):
    for equal in together(adapters_in_and_out, str(tmp_path)):
        assert len(equal) > 10
        assert all(equal)
    written = load_file(tmp_path / "last" / "adapter_model.safetensors")
    assert all(".layer.2." in name or "pooler" in name or "classifier" in name for name in written)
    assert json.loads((tmp_path / "last" / "adapter_config.json").read_text())["base"] is not None


class Restored(pl.Callback):
    """Keeps what a run starts from: weights, and the optimizer's averages."""

    def on_train_start(self, trainer, pl_module):
        self.weights = state(pl_module)
        self.averages = averages(trainer)


def averages(trainer):
    found = trainer.optimizers[0].state
    return [whole(found[p]["exp_avg"]).clone() for g in trainer.optimizers[0].param_groups for p in g["params"]]


class Ended(Restored):
    def on_train_start(self, trainer, pl_module):
        pass

    def on_train_end(self, trainer, pl_module):
        super().on_train_start(trainer, pl_module)


def written_by_two(folder):
    start()
    for case in (LORA, LAST):
        for name, strategy in (("full", FULL), ("sharded", SHARDED), ("ddp", "ddp")):
            ended = Ended()
            saves = ModelCheckpoint(folder, filename=f"{case}-{name}")
            fit(case, strategy, saves, ended, max_epochs=1)
            if dist.get_rank() == 0:
                torch.save((ended.weights, ended.averages), Path(folder, f"{case}-{name}.pt"))
    dist.barrier()


def read_by_another_number(folder, reader):
    start()
    found = []
    for case in (LORA, LAST):
        for name in ("full", "sharded", "ddp") if reader == "fsdp2" else ("full", "ddp"):
            strategy = FULL if reader == "fsdp2" else "ddp"
            restored = Restored()
            fit(case, strategy, restored, path=Path(folder, f"{case}-{name}.ckpt"), max_epochs=2)
            weights, means = torch.load(Path(folder, f"{case}-{name}.pt"))
            found += [torch.equal(restored.weights[n], weights[n]) for n in weights]
            found += [torch.equal(a, b) for a, b in zip(restored.averages, means, strict=True)]
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_checkpoints_go_from_two_processes_to_one_and_three_and_to_ddp(tmp_path):
    together(written_by_two, str(tmp_path))
    for count, reader in ((1, "fsdp2"), (3, "fsdp2"), (2, "ddp")):
        for equal in together(read_by_another_number, str(tmp_path), reader, count=count):
            assert len(equal) > 20
            assert all(equal), (count, reader)


def refusals(folder):
    start()
    folder, found = Path(folder), []
    base_of(LORA, folder)
    strategies = {"meta device": FULL(), "matches|no class": FULL(wrap_modules=["Blok"])}
    with lp.without_values():
        modules = [Task("llama"), Task("llama")]
    modules[1] = Task("llama")
    for module, (message, strategy) in zip(modules, strategies.items(), strict=True):
        runs = trainer(lp.PEFTStrategy(lp.LoRA(), show_summary=False), strategy=strategy, devices=2, max_steps=1)
        with pytest.raises(ValueError, match=message):
            runs.fit(module, DataLoader(Rows("llama"), batch_size=2))
        found.append(message)
    other = Task("llama")
    other.net.model.norm.weight.data += dist.get_rank()
    runs = trainer(lp.PEFTStrategy(lp.LoRA(), show_summary=False), strategy=FULL(), devices=2, max_steps=1)
    with pytest.raises(ValueError, match="frozen base of process 1 is not that of process 0"):
        runs.fit(other, DataLoader(Rows("llama"), batch_size=2))
    found.append("another base")
    for name, strategy in (("full", FULL), ("sharded", SHARDED)):
        fit(LORA, strategy, ModelCheckpoint(folder, filename=name), max_epochs=1)
        for rank, targets, message in ((4, ["q_proj", "v_proj"], "has another shape of"), (2, ["k_proj"], "lacks")):
            with pytest.raises(ValueError, match=message):
                fit(Case("llama", (lp.LoRA(rank=rank, targets=targets),)), strategy, path=folder / f"{name}.ckpt")
            found.append(f"{name} {message}")
    return found


@pytest.mark.slow
def test_what_would_go_wrong_silently_is_refused(tmp_path):
    files = [f"{name} {message}" for name in ("full", "sharded") for message in ("has another shape of", "lacks")]
    assert together(refusals, str(tmp_path)) == [["meta device", "matches|no class", "another base", *files]] * 2


class OwnSharding(Task):
    """Shards in configure_model, as Lightning's documentation has it."""

    def __init__(self, model):
        super().__init__(model)
        lp.inject(self, lp.LoRA(rank=2))

    def configure_model(self):
        for layer in self.net.model.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def sharded_by_its_user(folder):
    start()
    own = {"make": OwnSharding}
    stock = functools.partial(ModelParallelStrategy, 2, 1)
    return [resumed(LORA, s, Path(folder, str(i)), **own) for i, s in enumerate((FULL, SHARDED, stock))]


def sharded_together():
    """Return, of models that are sharded with their adapters, what differs afterwards from before."""
    start()
    own = lp.OwnParameters(targets=["0", "1"]), torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4))
    read = lp.LoRA(rank=2, targets=["out_proj"]), torch.nn.MultiheadAttention(8, 2, batch_first=True)
    differing = []
    for number, (method, net) in enumerate((own, read)):
        inputs = [torch.linspace(-1, 1, 48, dtype=torch.float64).view(2, 3, 8)] * (1, 3)[number]
        torch.manual_seed(1)
        for p in lp.inject(net.double(), method).parameters():
            torch.nn.init.normal_(p)
        before, values = net(*inputs), {n: p.detach().clone() for n, p in net.named_parameters()}
        fully_shard(net)
        after = net.double()(*inputs)  # FSDP2 reads each parameter from its module when it casts and when it starts
        pairs = [(before, after), (before[0], after[0])][number]
        differing += [] if torch.allclose(*pairs, rtol=1e-12) else [f"output {number}"]
        pairs[1].sum().backward()
        differing += [n for n, p in net.named_parameters() if not torch.equal(whole(p), values[n])]
        differing += [n for n, p in net.named_parameters() if (".peft." in n) != (p.grad is not None)]
    return differing


@pytest.mark.slow
def test_parameters_that_adapters_replace_or_show_changed_can_be_sharded():
    assert together(sharded_together) == [[], []]


def evaluated_anew(folder):
    start()
    found = []
    for strategy in (FULL, SHARDED):
        for method in (lp.LoRA(rank=2), lp.LastLayers(count=1)):
            path = f"{folder}/{type(method).__name__}-{strategy is FULL}.ckpt"
            runs = [trainer(lp.PEFTStrategy(method, show_summary=False), strategy=strategy(), devices=2) for _ in "ab"]
            module = Module("llama")
            runs[0].fit(module, data())
            runs[0].save_checkpoint(path, weights_only=True)
            losses = [runs[0].validate(module, data(), verbose=False)]
            losses += [runs[1].validate(Module("llama"), data(), ckpt_path=path, verbose=False)]
            found.append(losses[0][0]["val_loss"] == losses[1][0]["val_loss"])
    return found


@pytest.mark.slow
def test_another_trainer_evaluates_what_was_saved(tmp_path):
    assert together(evaluated_anew, str(tmp_path)) == [[True] * 4] * 2


class Compiled(Exact):
    def __init__(self, model):
        super().__init__(model)
        self.net.compile()


class CompiledBlocks(Exact):
    def __init__(self, model):
        super().__init__(model)
        for layer in self.net.model.layers:
            layer.compile()


class Recomputed(Exact):
    def __init__(self, model):
        super().__init__(model)
        self.net.gradient_checkpointing_enable()


def compiled_and_recomputed():
    start()
    found = []
    for make in (Compiled, CompiledBlocks, Recomputed):
        for case in (LORA, LAST):
            keep = Keep()
            fit(case, FULL, Double(), keep, make=make, max_steps=1)
            found.append(difference(keep.gradients, gradients_alone(case)))
    return found


@pytest.mark.slow
def test_compiled_and_recomputed_models_have_the_same_gradients():
    for found in together(compiled_and_recomputed):
        assert max(found[:4]) < 1e-5  # compiled, some of it is float32
        assert max(found[4:]) < 1e-11


def sharded_by_nobody():
    start()
    with pytest.raises(ValueError, match="peft.lora.a trains and is not sharded") as caught:
        fit(
            LORA, functools.partial(ModelParallelStrategy, data_parallel_size=2, tensor_parallel_size=1), make=Unsharded
        )
    return str(caught.value)


class Unsharded(Task):
    """Has the hook, and does nothing in it."""

    def configure_model(self):
        pass


@pytest.mark.slow
def test_adapters_that_nobody_keeps_equal_are_refused():
    own, other = together(sharded_by_nobody)
    assert "each process would train its own" in own
    assert "each process would train its own" in other


@pytest.mark.slow
def test_a_module_that_shards_itself_resumes_too(tmp_path):
    assert together(sharded_by_its_user, str(tmp_path)) == [[[], [], []]] * 2


def test_units_are_the_blocks_and_what_is_around_them():
    module = pl.LightningModule()
    module.net = MODELS["llama"]()
    lp.inject(module, lp.LoRA(rank=2), also_train=["lm_head"])
    units = plan_units(module, None, 4)
    assert list(units.modules) == ["net.model.layers.0", "net.model.layers.1", "net.model.layers.2", "net"]
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert units.replicated.keys() == trained
    assert "net.lm_head.weight" in trained
    sharded = sum(p.numel() for n, p in module.named_parameters() if n not in trained)
    assert f"holds {sharded / 1e3:.3g} kB of the units" in str(units)  # 4 bytes, 4 processes
    assert "3 x LlamaDecoderLayer: 7,744 parameters (float32), 0 of them train" in str(units)
    assert list(plan_units(module, ["LlamaMLP", "layers.1"], 4).modules) == [
        *[f"net.model.layers.{i}.mlp" for i in range(3)], "net.model.layers.1", "net"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="'LlamaLayer' is no class or name of a module here. .*LlamaDecoderLayer"):
        plan_units(module, ["LlamaLayer"], 4)
    assert not any(isinstance(part, FSDPModule) for part in module.modules())


def test_without_adapters_what_trains_is_sharded_in_one_type():
    module = pl.LightningModule()
    module.net = MODELS["bert"]()
    lp.inject(module, lp.LastLayers(count=1))
    assert plan_units(module, None, 2).replicated == {}
    module.net.classifier.bfloat16()
    with pytest.raises(ValueError, match="Parameters of net train in several types"):
        plan_units(module, None, 2)


def test_base_weights_are_found_under_other_beginnings_and_must_fit(tmp_path):
    network = MODELS["llama"]()
    save_model(network, str(tmp_path / "model.safetensors"))
    with lp.without_values():
        outer, inner = pl.LightningModule(), pl.LightningModule()
        outer.net = MODELS["llama"]()
        inner.body = MODELS["llama"]().model
    for module, name in ((outer, "net.model.layers.1.mlp.up_proj.weight"), (inner, "body.layers.1.mlp.up_proj.weight")):
        weights = find_base_weights(module, tmp_path)
        assert torch.equal(weights.read(name), network.model.layers[1].mlp.up_proj.weight)
    lp.inject(outer, lp.LoRA())
    outer.net.model.layers[0].extra = torch.nn.Linear(2, 2, device="meta").requires_grad_(False)
    with pytest.raises(ValueError, match="lacks 2 frozen parameters: net.model.layers.0.extra.weight"):
        find_base_weights(outer, tmp_path)
    outer.net.model.layers[0].extra = None
    outer.net.model.norm.weight = torch.nn.Parameter(torch.empty(3, device="meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(32,\) in .*, the model \(3,\)"):
        find_base_weights(outer, tmp_path)
    outer.net.register_buffer("table", torch.empty(2, device="meta"))
    with pytest.raises(ValueError, match="net.table is a buffer without values"):
        find_base_weights(outer, tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no .safetensors file"):
        find_base_weights(inner, tmp_path / "nowhere")


@pytest.mark.parametrize("method", [lp.FullFineTuning(), lp.LastLayers(count=1)], ids=lambda m: type(m).__name__)
def test_what_will_be_quantized_cannot_train(method):
    with lp.without_values():
        network = MODELS["llama"]()
    lp.quantize(network, "int8")
    with pytest.raises(TypeError, match="stored in few bits and cannot train"):
        lp.inject(network, method)
