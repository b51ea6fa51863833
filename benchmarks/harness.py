"""Side-by-side measurement in one process: models, the floor under every method, paired times, exact saved bytes."""

import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()

RESULTS = Path(__file__).parent / "results"
Batch = dict[str, Tensor]


def bert(small: bool = False, seed: int = 0) -> tuple[nn.Module, Batch]:
    """A BERT-like classifier, 6 layers of width 384, on 32 x 128 tokens."""
    layers, width, rows, tokens = (2, 96, 2, 16) if small else (6, 384, 32, 128)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(seed)
    model = BertForSequenceClassification(BertConfig(**shape(layers, width, 4 * width, 6), **no_dropout))
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}


def llama(small: bool = False, seed: int = 0) -> tuple[nn.Module, Batch]:
    """A Llama-like causal language model, 8 layers of width 512, on 8 x 256 tokens."""
    layers, width, rows, tokens = (2, 64, 2, 16) if small else (8, 512, 8, 256)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**shape(layers, width, 43 * width // 16, 8), tie_word_embeddings=False))
    ids = torch.randint(0, model.config.vocab_size, (rows, tokens))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def shape(layers: int, width: int, intermediate: int, heads: int) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": intermediate, "vocab_size": 8000}
    return {**sizes, "num_attention_heads": heads, "attn_implementation": "sdpa", "use_cache": False}


MODELS = {"bert": bert, "llama": llama}


def floor(model: nn.Module) -> nn.Module:
    """Freeze all but one new vector where the trunk begins: gradients flow through all of it, nothing else is done."""
    embeddings = getattr(model.requires_grad_(False).base_model, "embeddings", model.get_input_embeddings())
    embeddings.floor = nn.Parameter(torch.zeros(model.config.hidden_size))
    embeddings.register_forward_hook(lambda module, args, output: output + module.floor)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def train_step(loss_fn: Callable[[nn.Module, Batch], Tensor], model: nn.Module, batch: Batch) -> Callable[[], None]:
    """Return forward, backward and a step of torch's default AdamW, as one call."""
    optimizer = torch.optim.AdamW(trained(model.train()), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()

    return step


def paired(
    functions: dict[str, Callable],
    rounds: int,
    budget_s: float,
    setup: Callable | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict:
    """Return seconds by name of calls that take turns, in reversed order every other round, after one warm-up each.

    Stops once ``budget_s`` is spent, but not before three rounds. What ``setup`` returns, untimed, goes into the call.
    """
    start, times = time.perf_counter(), {name: [] for name in functions}
    for turn in range(-1, rounds):
        gc.collect()
        gc.disable()
        for name in list(functions)[:: -1 if turn % 2 else 1]:
            arguments = () if setup is None else (setup(),)
            begin = clock()
            functions[name](*arguments)
            if turn >= 0:
                times[name].append(clock() - begin)
        gc.enable()
        if turn >= 2 and time.perf_counter() - start > budget_s:
            break
    return times


def ratio(times: dict[str, list[float]], name: str, reference: str) -> float:
    """Return the median of the ratios of each round."""
    return statistics.median(a / b for a, b in zip(times[name], times[reference], strict=True))


def saved_bytes(loss_fn: Callable[[nn.Module, Batch], Tensor], model: nn.Module, batch: Batch) -> int:
    """Return the bytes of all storages kept for backward, each once; parameters, buffers and the batch left out.

    Tensors that a custom function keeps as attributes, which hooks on saved tensors do not see, count as well.
    """
    kept = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no later tensor gets its address
        return x.detach()  # an output that its own node holds would never be freed

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = loss_fn(model, batch)
    seen, waiting = {None}, [result.grad_fn]
    while waiting:
        if (node := waiting.pop()) not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            for x in filter(torch.is_tensor, tree_leaves(getattr(node, "__dict__", {}))):
                keep(x)
    for x in (*model.parameters(), *model.buffers(), *batch.values()):
        kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def environment() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    versions = {name: version(name) for name in ("torch", "lightning", "transformers", "peft", "lightning-peft")}
    machine = {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return {"date": str(date.today()), "python": platform.python_version(), **machine, **versions}


def write(results: dict[str, Any], name: str) -> dict[str, Any]:
    """Merge results into a file of benchmarks/results, with where they were measured; return all it holds now."""
    path, where = RESULTS / f"{name}.json", environment()
    old = json.loads(path.read_text()) if path.exists() else {"where": where, "results": {}}
    if old["where"] | {"date": ""} != where | {"date": ""}:
        print(f"{path.name} was measured in another environment; it starts anew.")
        old["results"] = {}
    results = merge(old["results"], results)
    path.write_text(as_json({"where": where, "results": results}) + "\n")
    return results


def as_json(value: Any, indent: str = "") -> str:
    """Return a value as JSON with sorted keys; what holds no other mapping stands on one line."""
    if not isinstance(value, dict) or not any(isinstance(each, dict) for each in value.values()):
        return json.dumps(value, sort_keys=True)
    inner = indent + "  "
    lines = [f"{inner}{json.dumps(key)}: {as_json(value[key], inner)}" for key in sorted(value)]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def merge(old: dict, new: dict) -> dict:
    return old | {k: merge(old.get(k, {}), v) if isinstance(v, dict) else v for k, v in new.items()}


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    lines = [columns, ["---"] * len(columns), *([str(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
