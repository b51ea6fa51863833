"""python benchmarks/seq2seq.py --data FOLDER: adapts a small T5 to restaurants that it has never read of.

No pretrained text-to-text model is at hand without a network, so a T5 (two layers of width 128 on each side, 2,000
tokens trained on the texts) first learns from 12,000 rows of E2E that name no type of place: full fine-tuning from
random weights. Then LoRA, prefixes and full fine-tuning learn from 4,000 rows of pubs and restaurants. Each run is
configs/seq2seq.yaml with the arguments that are printed. One row of each of 300 meanings of the test set is written
greedily, and compared with its one reference. Writes results/seq2seq.json.
"""

import argparse
import gzip
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import harness
import torch
import yaml
from lightning import Trainer

from lightning_peft.cli.main import main
from lightning_peft.tasks import Seq2Seq, Seq2SeqDataModule

DATA = Path(__file__).parents[2] / "shared" / "data"
CONFIG = Path(__file__).parents[1] / "configs" / "seq2seq.yaml"
SIZES = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
T5 = {"model_type": "t5", "vocab_size": 2000, "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1, **SIZES}
COLUMNS = ["--data.source=mr", "--data.target=text", "--data.max_source_length=96", "--data.max_target_length=96"]
LORA = ["--peft.method.rank=16", "--peft.method.alpha=32", "--peft.method.targets=[all-linear]"]
METHODS = {
    "LoRA": ["--peft.method=LoRA", *LORA, "--model.learning_rate=3e-3"],
    "prefix": ["--peft.method=PrefixTuning", "--peft.method.length=16", "--peft.method.targets=[attention]",
               "--model.learning_rate=1e-2"],
    "full": ["--peft.method=FullFineTuning", "--model.learning_rate=1e-3"],
}  # fmt: skip


def read(folder: Path, split: str) -> list[dict[str, str]]:
    data = gzip.decompress((folder / "e2e" / f"{split}.jsonl.gz").read_bytes()).decode()
    return [json.loads(line) for line in data.splitlines()]


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def kind(row: dict[str, str]) -> str:
    return next((part[7:] for part in row["mr"].split(" | ") if part.startswith("Type : ")), "none")


def save_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def fit(name: str, folder: Path, *arguments: str) -> tuple[Path, dict[str, float]]:
    """Run the configuration; return the checkpoint, what trained, and the seconds."""
    text = yaml.safe_load(CONFIG.read_text())
    text["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": str(folder / name)}
    text["trainer"]["logger"]["init_args"] = {"save_dir": str(folder / name), "name": "", "version": ""}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(text))
    print(f"lightning-peft fit --config configs/seq2seq.yaml {' '.join(arguments)}", flush=True)
    begin = time.perf_counter()
    main(
        ["fit", "--config", str(folder / f"{name}.yaml"), "--model.generate_in_validation=false", *COLUMNS, *arguments]
    )
    seconds = round(time.perf_counter() - begin, 1)
    return next((folder / name).rglob("*.ckpt")), {"seconds": seconds}


def scores(module: Any, data: Seq2SeqDataModule) -> dict[str, float]:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    module.hparams["generate_in_validation"] = True
    (found,) = Trainer(accelerator="cpu", **quiet).test(module, data, verbose=False)
    return {name.removeprefix("test_"): round(value, 4) for name, value in found.items()}


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows, test, once = read(options.data, "train"), read(options.data, "test"), {}
    for row in test:
        once.setdefault(row["mr"], row)
    places = ("pub", "restaurant")
    base = write(folder / "base.jsonl", [row for row in rows if kind(row) == "none"][: options.limit or 12_000])
    adapt = write(folder / "adapt.jsonl", [row for row in rows if kind(row) in places][: options.limit or 4_000])
    asked = write(folder / "test.jsonl", [row for row in once.values() if kind(row) in places][: options.limit or 300])
    save_tokenizer(folder / "t5", (text for row in rows for text in row.values()))
    tokenizer = ["--data.tokenizer", str(folder / "t5")]
    start = ["--model.model=null", f"--model.config={json.dumps(T5)}", "--peft.method=FullFineTuning"]
    first = ["--trainer.max_epochs", str(options.epochs), "--model.learning_rate=2e-3", "--data.train", base]
    path, cost = fit("base", folder, *start, *first, *tokenizer)
    Seq2Seq.load_from_checkpoint(path).network.save_pretrained(folder / "t5")
    data = Seq2SeqDataModule(
        test=asked, source="mr", target="text", tokenizer=str(folder / "t5"), max_source_length=96, batch_size=64
    )
    model = str(folder / "t5")
    results = {"base, not adapted": {**scores(Seq2Seq(model=model), data), **cost}}
    for name, arguments in METHODS.items():
        more = ["--model.model", model, "--data.train", adapt, "--trainer.max_epochs", str(options.epochs)]
        path, cost = fit(name, folder, *arguments, *more)
        module = Seq2Seq.load_from_checkpoint(path)
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        results[name] = {**scores(module, data), "trained": trained, **cost}
        print(name, results[name], flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--limit", type=int, default=None, help="rows of each set, to see that it runs")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # which the command line interface looks at
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        found = run(options, Path(folder))
    if options.limit is None:
        harness.write({"e2e": found}, "seq2seq")
    print(harness.table([{"run": name, **row} for name, row in found.items()],
                        ["run", "loss", "rouge1", "rouge2", "rougeL", "bleu", "trained", "seconds"]))  # fmt: skip
