"""python benchmarks/listed_choices.py --data FOLDER: questions of TREC, each with its own list of what it may ask for.

Each row lists the right one of six kinds of answers and two to four others, in an order of its own; the label is the
text of the right one. A T5 of two layers of width 128 with random weights learns from 4,952 rows by
configs/choices.yaml with the arguments that are printed: full fine-tuning, since there is nothing to adapt. Writes
results/listed_choices.json: accuracy on the 500 test rows, beside that of a guess.
"""

import argparse
import gzip
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import yaml
from lightning import Trainer
from seq2seq import DATA, T5, save_tokenizer, write

from lightning_peft.cli.main import main
from lightning_peft.tasks import Choices, ChoicesDataModule

CONFIG = Path(__file__).parents[1] / "configs" / "choices.yaml"
KINDS = {"ABBR": "a short form", "DESC": "a description", "ENTY": "a thing", "HUM": "a person", "LOC": "a place",
         "NUM": "a number"}  # fmt: skip


def listed(folder: Path, split: str) -> list[dict[str, Any]]:
    """The rows of a split, each with three to five choices."""
    path = next((folder / "trec").glob(f"{split}.jsonl*"))
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    draw, rows = random.Random(0), []  # noqa: S311
    for row in map(json.loads, data.decode().splitlines()):
        right = KINDS[row["label"]]
        choices = [right, *draw.sample([text for text in KINDS.values() if text != right], draw.randint(2, 4))]
        draw.shuffle(choices)
        rows.append({"question": row["text"], "choices": choices, "label": right})
    return rows


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    train, test = (listed(options.data, split)[: options.limit] for split in ("train", "test"))
    save_tokenizer(folder / "t5", (row["question"] for row in train))
    text = yaml.safe_load(CONFIG.read_text())
    text["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": str(folder)}
    text["trainer"]["callbacks"][0]["init_args"] = {}
    text["trainer"]["logger"]["init_args"] = {"save_dir": str(folder), "name": "", "version": ""}
    (folder / "choices.yaml").write_text(yaml.safe_dump(text))
    arguments = ["--model.model=null", f"--model.config={json.dumps(T5)}", "--peft.method=FullFineTuning",
                 "--data.tokenizer", str(folder / "t5"), "--data.train", write(folder / "train.jsonl", train),
                 f"--trainer.max_epochs={options.epochs}", "--data.validation_fraction=0"]  # fmt: skip
    print(f"lightning-peft fit --config configs/choices.yaml {' '.join(arguments)}", flush=True)
    begin = time.perf_counter()
    main(["fit", "--config", str(folder / "choices.yaml"), *arguments])
    seconds = round(time.perf_counter() - begin, 1)
    module = Choices.load_from_checkpoint(next(folder.rglob("*.ckpt")))
    data = ChoicesDataModule(
        {"asked": "{question} Answer:"}, choices="choices", test=write(folder / "test.jsonl", test),
        tokenizer=str(folder / "t5"), batch_size=50,
    )  # fmt: skip
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    (found,) = Trainer(accelerator="cpu", **quiet).test(module, data, verbose=False)
    guess = sum(1 / len(row["choices"]) for row in test) / len(test)
    return {"accuracy": round(found["test_accuracy"], 4), "of a guess": round(guess, 4), "seconds": seconds}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--limit", type=int, default=None, help="rows of each set, to see that it runs")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # which the command line interface looks at
    with tempfile.TemporaryDirectory() as folder:
        found = run(options, Path(folder))
    if options.limit is None:
        harness.write({"trec": found}, "listed_choices")
    print(harness.table([found], list(found)))
