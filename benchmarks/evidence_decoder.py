"""One run of benchmarks/evidence.py on E2E: a small decoder writes of places that it has never read of, by a method.

The base is a Llama of two layers that has read children's stories (tinystories-656k), and then, by full fine-tuning,
rows of E2E that name no type of place. Methods learn from rows of pubs and restaurants. The result is the loss of a
token of the test texts, a text for each meaning.
"""

import random
import tempfile
from pathlib import Path
from typing import Any

from evidence_fit import Fit, best_of, read, write

import lightning_peft as lp
from lightning_peft.tasks import CausalLM, InstructionDataModule

# What configs/ say of MiniLM's 384 features, for 128: ranks and lengths stay, sizes are a third.
LINEAR = ["all-linear"]
SECTIONS: dict[str, tuple[float, Any]] = {  # with the middle one of the learning rates
    "full_fine_tuning": (1e-3, lp.FullFineTuning()),
    "last_layers": (1e-3, lp.LastLayers(count=1)),
    "lora": (5e-3, lp.LoRA(rank=8, alpha=16, targets=LINEAR)),
    "dora": (5e-3, lp.LoRA(rank=8, alpha=16, targets=LINEAR, decompose=True)),
    "adalora": (5e-3, lp.AdaLoRA(initial_rank=12, target_rank=8, alpha=16, targets=LINEAR)),
    "fedpara": (5e-3, lp.FedPara(rank=8, targets=LINEAR)),
    "krona": (5e-3, lp.KronA(shape_a=[16, 8], scale=16, targets=["attention.query", "attention.value"])),
    "krona_block": (5e-3, lp.KronABlock(shape_a=[8, 16], scale=16)),
    "krona_block_residual": (5e-3, lp.KronABlock(shape_a=[8, 16], scale=16, residual=True)),
    "ia3": (1e-2, lp.IA3()),
    "qlora": (5e-3, lp.LoRA(rank=8, alpha=16, targets=LINEAR)),
    "bottleneck": (3e-3, lp.Bottleneck(size=24, activation="gelu")),
    "parallel_adapter": (3e-3, lp.ParallelAdapter(size=24, scale=4)),
    "mam": (3e-3, [lp.PrefixTuning(length=16), lp.ParallelAdapter(size=8, scale=2)]),
    "prefix_tuning": (3e-3, lp.PrefixTuning(length=10)),
    "p_tuning_v2": (1e-2, lp.PTuningV2(length=20)),
    "llama_adapter": (1e-2, lp.LLaMAAdapter(length=10, layers=2)),
    "llama_adapter_2": (1e-2, lp.LLaMAAdapter(length=10, layers=2, train_norms=True, bias_and_scale=True)),
    "prompt_tuning": (2e-2, lp.PromptTuning(length=20, init="vocabulary")),
    "multitask_prompt_tuning": (2e-2, lp.MultitaskPromptTuning(length=20, init="vocabulary")),
    "p_tuning": (3e-3, lp.PTuning(length=20)),
}
METHODS = ["base", *SECTIONS]
RATES = {"base": 2e-3, **{name: rate for name, (rate, _) in SECTIONS.items()}}


def kind(row: dict[str, str]) -> str:
    return next((part[7:] for part in row["mr"].split(" | ") if part.startswith("Type : ")), "none")


def of_kinds(folder: Path, split: str, kinds: list[str]) -> list[dict[str, str]]:
    """Return rows of some types of place in a random order, which is always the same."""
    rows = [row for row in read(folder / "e2e", split) if kind(row) in kinds]
    return random.Random(0).sample(rows, len(rows))  # noqa: S311


def data_of(place: Path, settings: dict[str, Any], seed: int, model: str, *kinds: str) -> InstructionDataModule:
    """Rows of a seed to train on, and the same for all seeds to validate (from the train file) and to test on."""
    rows, count = of_kinds(settings["data"], "train", list(kinds)), settings["decoder_test_rows"]
    once = list({row["mr"]: row for row in of_kinds(settings["data"], "test", list(kinds))}.values())
    size = min(len(rows) - count, settings["decoder_rows"])
    train = random.Random(seed).sample(rows[count:], size)  # noqa: S311
    parts = {"train": train, "validation": rows[:count], "test": once[:count]}
    files = {split: write(place / f"{split}.jsonl", part) for split, part in parts.items()}
    columns = {"instruction": "mr", "input": None, "output": "text", "prompt_style": "plain"}
    size = settings["decoder_batch_size"]
    return InstructionDataModule(**files, **columns, model=model, max_length=256, batch_size=size)


def base(settings: dict[str, Any]) -> str:
    """Return the folder of the base, which is trained if it is not there."""
    folder = settings["work"] / "decoder"
    if not folder.exists():
        with tempfile.TemporaryDirectory() as place:
            more = settings | {"decoder_rows": 10 * settings["decoder_rows"]}
            data = data_of(Path(place), more, 0, str(settings["models"] / "tinystories-656k"), "none")
            fit = Fit(built(data), strategy("full_fine_tuning"), data, 2e-3, 0)
        new = folder.with_suffix(".new")
        fit.module.network.save_pretrained(new)
        data.tokenizer.save_pretrained(new)
        new.rename(folder)
    return str(folder)


def built(data: InstructionDataModule) -> Any:
    return lambda rate: CausalLM(data.reference, learning_rate=rate, dtype="float32")


def strategy(method: str) -> lp.PEFTStrategy:
    settings = {"quantize": "nf4"} if method == "qlora" else {}
    return lp.PEFTStrategy(SECTIONS[method][1], show_summary=False, **settings)


def run(method: str, name: str, seed: int, rates: list[float], settings: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        data = data_of(Path(folder), settings, seed, base(settings), "pub", "restaurant")
        if method == "base":
            fit = Fit(built(data), None, data, 1.0, seed)
            loss = fit.score("test", "test")["loss"]
            return {"test": -loss, "test_loss": loss, "validation": -fit.validation["loss"], "trained": 0}
        return best_of(rates, lambda rate: Fit(built(data), strategy(method), data, rate, seed))
