"""python benchmarks/weight_space.py: LoRA and its kin beside HF peft and the floor; writes results/weight_space.json.

Each part can run again alone (--only, --models, --methods): its numbers replace the old ones in the file. With --small
the sizes are tiny, the numbers mean nothing, and nothing is written.
"""

import itertools
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import harness
import lightning.pytorch as pl
import peft
import rows
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from rows import Row, found, timed
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft as lp
from lightning_peft.inject import adapters_of

LINEARS = {
    "bert": ("query", "key", "value", "attention.output.dense", "intermediate.dense", "*[0-9].output.dense"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
QUERY_VALUE = {"bert": ("query", "value"), "llama": ("q_proj", "v_proj")}


def ours(name: str, **settings: Any) -> Callable[[tuple[str, ...]], lp.Method]:
    return lambda targets: getattr(lp, name)(targets=list(targets), **settings)


def peer(name: str, **settings: Any) -> Callable[[tuple[str, ...]], peft.PeftConfig]:
    def config(targets: tuple[str, ...]) -> peft.PeftConfig:
        patterns = "|".join(glob.replace(".", r"\.").replace("*", ".*") for glob in targets)
        return getattr(peft, name)(target_modules=rf".*\.({patterns})", **settings)

    return config


def bf16_loss(model: nn.Module, batch: harness.Batch) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return harness.loss(model, batch)


class Case(NamedTuple):
    """A method on both sides, with the ratios to reach: a training step's to the floor and to peft, saved bytes'."""

    ours: Callable[[tuple[str, ...]], lp.Method]
    peer: Callable[[tuple[str, ...]], peft.PeftConfig]
    floor_goal: float | None = None
    peft_goal: float | None = None
    bytes_goal: float = 1.0
    parts: tuple[str, ...] = ("bytes", "train", "eval")
    loss: Callable[[nn.Module, harness.Batch], Tensor] = harness.loss
    targets: Mapping[str, tuple[str, ...]] = LINEARS


LORA, PEFT_LORA = partial(ours, "LoRA", rank=8, alpha=16), partial(peer, "LoraConfig", r=8, lora_alpha=16)
ADALORA = partial(ours, "AdaLoRA", initial_rank=8, target_rank=4)
PEFT_ADALORA = partial(peer, "AdaLoraConfig", init_r=8, target_r=4, lora_alpha=16, total_step=1000)
WHOLE = {"r": 4096, "alpha": 4096}  # a rank above every side keeps both factors of LoKr whole, and its scale 1
CASES = {
    "lora": Case(LORA(), PEFT_LORA(), 1.10, 0.85),
    "lora_query_value": Case(LORA(), PEFT_LORA(), targets=QUERY_VALUE),
    "lora_dropout": Case(LORA(dropout=0.05), PEFT_LORA(lora_dropout=0.05), None, None, 0.67, ("bytes", "train")),
    "lora_bf16": Case(LORA(), PEFT_LORA(), 1.10, 0.85, parts=("bytes", "train"), loss=bf16_loss),
    "dora": Case(LORA(decompose=True), PEFT_LORA(use_dora=True), 1.10, 0.80, bytes_goal=0.55),
    "adalora": Case(ADALORA(), PEFT_ADALORA(), 1.10, 0.85),
    "fedpara": Case(ours("FedPara", rank=8), peer("LoHaConfig", r=8, alpha=8), 1.30, 0.55),
    "krona": Case(ours("KronA"), peer("LoKrConfig", decompose_factor=-1, **WHOLE), 1.30, 0.55),
}


def both(kind: str, case: Case, small: bool) -> tuple[lp.Method, dict[str, nn.Module], dict[str, int]] | None:
    """Return our method, and both sides' models and trained counts; nothing where the package lacks the method."""
    try:
        method = case.ours(case.targets[kind])
    except (AttributeError, TypeError) as error:
        print(f"skipped on {kind}: {error}")
        return None
    build = partial(harness.MODELS[kind], small)
    wrapped = peft.get_peft_model(build()[0], case.peer(case.targets[kind]))
    models = {"ours": lp.inject(build()[0], method), "peft": wrapped}
    for parameter in itertools.chain(*map(harness.trained, models.values())):
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    hosts = {name for name, *_ in lp.adapters(models["ours"])}
    assert len(hosts) == sum(isinstance(module, BaseTunerLayer) for module in wrapped.modules())
    counts = {who: sum(p.numel() for p in harness.trained(model)) for who, model in models.items()}
    assert not isinstance(method, lp.LoRA) or counts["ours"] == counts["peft"]
    return method, models, counts


def compare(kind: str, case: Case, options: Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Saved bytes, training step and eval forward of one method, by part."""
    parts = [part for part in case.parts if part in options.only]
    if not parts or (pair := both(kind, case, options.small)) is None:
        return
    base, batch = harness.MODELS[kind](options.small)
    _, models, counts = pair
    models = {"floor": harness.floor(base), "ours": models["ours"], "peft": models["peft"].base_model.model}
    for part in parts:
        if part == "bytes":
            sizes = {who: harness.saved_bytes(case.loss, model.train(), batch) for who, model in models.items()}
            values = {"ours/floor": sizes["ours"] / sizes["floor"], "ours/peft": sizes["ours"] / sizes["peft"]}
            row = found(values, {"ours/peft": case.bytes_goal}, bytes=sizes, trained=counts)
        elif part == "train":
            goals = {"ours/floor": case.floor_goal, "ours/peft": case.peft_goal, "peft/floor": None}
            steps = {who: harness.train_step(case.loss, model, batch) for who, model in models.items()}
            row = timed(goals, options, steps)
            assert all(p.grad is not None for model in models.values() for p in harness.trained(model))
        else:
            forwards = {who: torch.no_grad()(partial(case.loss, m.eval(), batch)) for who, m in models.items()}
            row = timed({"ours/floor": 1.03, "ours/peft": 1.00, "peft/floor": None}, options, forwards)
        yield part, row


def optimizer(kind: str, options: Namespace) -> Iterator[Row]:
    """A step of AdamW over LoRA's tensors: torch's default, fused, and fused over all of them laid out in one."""
    tensors = [p.detach() for p in harness.trained(both(kind, CASES["lora"], options.small)[1]["ours"])]
    flat, calls = torch.cat([x.flatten() for x in tensors]), {}
    for name, source, fused in (("default", tensors, None), ("fused", tensors, True), ("flat", [flat], True)):
        parameters = with_gradients([nn.Parameter(x.clone()) for x in source])
        calls[name] = torch.optim.AdamW(parameters, lr=1e-4, fused=fused).step
    yield "optimizer", kind, "lora", timed({"fused/default": 0.35, "flat/default": None}, options, calls)


def with_gradients(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def allocation(kind: str, options: Namespace) -> Iterator[Row]:
    """AdaLoRA's work after each step, with a new budget each time."""
    schedule, same = {"warmup_steps": 0, "final_steps": 0, "interval": 1}, {"tinit": 0, "tfinal": 0, "deltaT": 1}
    if (pair := both(kind, Case(ADALORA(**schedule), PEFT_ADALORA(**same)), options.small)) is None:
        return
    method, models, _ = pair
    with_gradients([p for model in models.values() for p in harness.trained(model)])
    adapters, steps = list(adapters_of(models["ours"], method).values()), {who: itertools.count(1) for who in models}
    calls = {
        "ours": lambda: method.after_step(adapters, next(steps["ours"]), 1000),
        "peft": lambda: models["peft"].base_model.update_and_allocate(next(steps["peft"])),
    }
    yield "allocation", kind, "adalora", timed({"ours/peft": 0.35}, options, calls)


def injection(options: Namespace) -> Iterator[Row]:
    """LoRA into all linears of a 7B Llama's shape on the meta device."""
    config = LlamaConfig(**harness.shape(2 if options.small else 32, 4096, 11008, 32))
    method, peer_config = LORA()(LINEARS["llama"]), PEFT_LORA()(LINEARS["llama"])

    def setup() -> nn.Module:
        with torch.device("meta"):
            return LlamaForCausalLM(config)

    calls = {
        "ours": partial(lp.inject, method=method),
        "peft": partial(peft.get_peft_model, peft_config=peer_config),
        "peft_empty": partial(peft.inject_adapter_in_model, peer_config, low_cpu_mem_usage=True),
    }
    row = timed({"ours/peft": 0.1, "ours/peft_empty": None}, options, calls, setup)
    row["values"]["seconds"], row["goals"]["seconds"] = row["seconds"]["ours"], 0.2
    yield "injection", "llama 7B", "lora", row


class Net(pl.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: harness.Batch, index: int) -> Tensor:
        return harness.loss(self.network, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(harness.trained(self), lr=1e-4)


def checkpoint(options: Namespace) -> Iterator[Row]:
    """Lightning's checkpoints of a Llama of 170 million parameters: with the callback, and of a peft model without."""
    sizes = harness.shape(2, 64, 172, 4) if options.small else harness.shape(12, 1024, 2752, 16)
    model, base = (LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False)) for _ in range(2))
    ids = torch.arange(8)[None]
    wrapped = peft.get_peft_model(base, PEFT_LORA()(LINEARS["llama"]))
    strategy = lp.PEFTStrategy(LORA()(LINEARS["llama"]), show_summary=False)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    data = torch.utils.data.DataLoader([{"input_ids": ids, "labels": ids}], batch_size=None)
    saves, loads, paths = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for who, network, callbacks in (("ours", model, [strategy]), ("peft", wrapped, [])):
            trainer = pl.Trainer(max_steps=1, accelerator="cpu", callbacks=callbacks, **quiet)
            trainer.fit(Net(network), data)
            paths[who] = Path(folder) / who
            saves[who], loads[who] = partial(trainer.save_checkpoint, paths[who]), partial(load, trainer, paths[who])
        save = timed({"ours/peft": 0.05}, options, saves)
        yield (
            "checkpoint",
            "llama 170M",
            "save",
            save | {"bytes": {who: path.stat().st_size for who, path in paths.items()}},
        )
        yield "checkpoint", "llama 170M", "load", timed({"ours/peft": 0.10}, options, loads)


def load(trainer: pl.Trainer, path: Path) -> None:
    content = trainer.strategy.load_checkpoint(path)
    trainer.lightning_module.on_load_checkpoint(content)
    trainer.strategy.load_model_state_dict(content)


def run(options: Namespace) -> Iterator[Row]:
    for kind, name in itertools.product(options.models, options.methods):
        yield from ((part, kind, name, row) for part, row in compare(kind, CASES[name], options))
    for part, kind in itertools.product((optimizer, allocation), options.models):
        yield from part(kind, options) if part.__name__ in options.only else ()
    for part in (injection, checkpoint):
        yield from part(options) if part.__name__ in options.only else ()


if __name__ == "__main__":
    parts = ["train", "eval", "bytes", "optimizer", "allocation", "injection", "checkpoint"]
    choices = {"only": parts, "models": list(harness.MODELS), "methods": list(CASES)}
    rows.main("weight_space", __doc__, choices, run)
