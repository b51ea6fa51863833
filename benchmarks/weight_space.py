"""python benchmarks/weight_space.py: LoRA and its kin beside HF peft and the floor; writes results/weight_space.json.

Each part can run again alone (--only, --models, --methods): its numbers replace the old ones in the file. With --small
the sizes are tiny, the numbers mean nothing, and nothing is written.
"""

import itertools
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import harness
import lightning.pytorch as pl
import peft
import rows
import torch
from rows import Row, timed
from sides import Case, both, compare, ours, pattern, peer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft as lp
from lightning_peft.core.injection_record import adapters_of

LINEARS = {
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "*[0-9].output.dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
QUERY_VALUE = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}


def bf16_loss(model: nn.Module, batch: harness.Batch) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return harness.loss(model, batch)


ALL = {"target_modules": pattern(LINEARS)}
LORA = partial(ours, "LoRA", targets=LINEARS, rank=8, alpha=16)
PEFT_LORA = partial(peer, "LoraConfig", **ALL, r=8, lora_alpha=16)
ADALORA = partial(ours, "AdaLoRA", targets=LINEARS, initial_rank=8, target_rank=4)
PEFT_ADALORA = partial(peer, "AdaLoraConfig", **ALL, init_r=8, target_r=4, lora_alpha=16, total_step=1000)
LOHA = peer("LoHaConfig", **ALL, r=8, alpha=8)
# A rank above every side keeps both factors of LoKr whole, and its scale 1. Their shapes are not those of KronA.
LOKR = peer("LoKrConfig", **ALL, decompose_factor=-1, r=4096, alpha=4096)
CASES = {
    "lora": Case(LORA(), PEFT_LORA(), 1.10, 0.85),
    "lora_query_value": Case(LORA(targets=QUERY_VALUE), PEFT_LORA(target_modules=pattern(QUERY_VALUE))),
    "lora_dropout": Case(LORA(dropout=0.05), PEFT_LORA(lora_dropout=0.05), bytes_goal=0.67, parts=("bytes", "train")),
    "lora_bf16": Case(LORA(), PEFT_LORA(), 1.10, 0.85, parts=("bytes", "train"), loss=bf16_loss),
    "dora": Case(LORA(decompose=True), PEFT_LORA(use_dora=True), 1.10, 0.80, bytes_goal=0.55),
    "adalora": Case(ADALORA(), PEFT_ADALORA(), 1.10, 0.85),
    "fedpara": Case(ours("FedPara", targets=LINEARS, rank=8), LOHA, 1.30, 0.55),
    "krona": Case(ours("KronA", targets=LINEARS), LOKR, 1.30, 0.55, surplus=None),
}


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
    method, models, _ = both(kind, Case(ADALORA(**schedule), PEFT_ADALORA(**same)), options.small)
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
    method, peer_config = LORA()(config), PEFT_LORA()(config)

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
    wrapped = peft.get_peft_model(base, PEFT_LORA()(model.config))
    strategy = lp.PEFTStrategy(LORA()(model.config), show_summary=False)
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
