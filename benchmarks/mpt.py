"""python benchmarks/mpt.py --lama FOLDER: does a prompt learned on other tasks beat a fresh one with few target rows?

No pretrained masked language model is at hand without a network, so MiniLM with a fresh head for masks is first taught
facts of LAMA, each in one wording ("Norway is the country of X ."), those of the target's test rows among them; then
all of it is frozen. A task is to be asked for the facts of one relation in LAMA's other, hand-written wording ("X is
located in ? ."): what was taught has to be reached by virtual tokens. ``lightning-peft mpt`` trains a teacher for each
source relation and one shared prompt for all. On the target, a relation that no prompt has seen, three prompts of the
same length then train for the same steps on the same few rows, drawn anew for each seed: the shared one (multitask
prompt tuning: P*, and u and v from their means), a fresh one from the vocabulary, and that of the teacher whose loss on
these rows is lowest before training. Each trains at every rate; the rate is chosen by the mean over seeds on
development rows. Beside them: the shared prompt and the bare model without any training on the target, and the most
frequent answer. Writes results/mpt.json. P@1 is over all 30,522 tokens of the vocabulary. With ``--work FOLDER``, what
was taught and trained on the sources stays there, and a second run begins with the target.
"""

import argparse
import functools
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
from datasets import concatenate_datasets
from knowledge_probe import LAMA, MODEL, TOKENIZER, by_hand, lesson, of, read, single_tokens
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import lightning_peft as lp
from lightning_peft.recipes.multitask_prompt_tuning import mpt
from lightning_peft.recipes.stages import Training
from lightning_peft.tasks import Cloze, ClozeDataModule
from lightning_peft.tasks.data.encoding.examples import Examples
from lightning_peft.tasks.module import mean_loss
from lightning_peft.tasks.optimization import multiplier
from lightning_peft.tasks.pretrained import locate, transformers

Start = Callable[[ClozeDataModule], Cloze]


class MaskedCloze(Cloze):
    """Cloze that computes the vocabulary's logits at the mask alone."""

    def forward(self, **batch: Tensor) -> Tensor:
        ids = batch["input_ids"]
        with self.own_tasks(batch):
            hidden = self.network.base_model(input_ids=ids, attention_mask=batch["attention_mask"]).last_hidden_state
        return self.network.cls(hidden[ids == self.tokenizer.mask_token_id])


def write(rows: list[dict[str, str]], file: Path) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def questions(rows: list[dict[str, str]], template: str, file: Path, **settings: Any) -> ClozeDataModule:
    settings = {"validation_fraction": 0, **settings}
    return ClozeDataModule(
        template, train=str(write(rows, file)), answer="obj", tokenizer=MODEL, max_length=48, shorten="sub", **settings
    )


def batches(data: ClozeDataModule, size: int) -> list[dict[str, Tensor]]:
    rows = data.examples("train")
    return [data.collate(rows[i : i + size]) for i in range(0, len(rows), size)]


@torch.no_grad()
def measured(module: Cloze, data: ClozeDataModule) -> tuple[float, float]:
    """P@1 and loss, both over the vocabulary."""
    module.eval()
    pairs = [module.labelled(batch) for batch in batches(data, 50)]
    logits, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return (logits.argmax(1) == labels).float().mean().item(), mean_loss(logits, labels).item()


def trained(module: Cloze, data: ClozeDataModule, steps: int, rate: float, seed: int, size: int = 16) -> Cloze:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    schedule = LambdaLR(optimizer, multiplier(steps, 0.06, "linear"))
    order, rows = torch.Generator().manual_seed(seed), data.examples("train")
    for _ in range(steps):
        chosen = torch.randint(len(rows), (size,), generator=order).tolist()
        loss = mean_loss(*module.labelled(data.collate([rows[i] for i in chosen])))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return module


def taught(lessons: list[ClozeDataModule], folder: Path, epochs: int) -> str:
    """Write MiniLM with a head, both of which have learned the lessons, unless it is there; return its folder."""
    if (folder / "taught").exists():
        return str(folder)
    torch.manual_seed(0)
    network = transformers().AutoModelForMaskedLM.from_pretrained(locate(MODEL))
    network.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    module = MaskedCloze(model=str(folder)).train()
    rows = Examples(concatenate_datasets([data.examples("train").rows for data in lessons]))
    vars(lessons[0])["examples"] = lambda split: rows
    trained(module, lessons[0], epochs * len(rows) // 32, 3e-4, 0, size=32)
    print(f"taught {len(rows)} facts: P@1 {measured(module, lessons[0])[0]:.3f}", flush=True)
    module.network.save_pretrained(folder)
    (folder / "taught").touch()
    return str(folder)


def starts(base: str, output: Path, sources: list[str], length: int) -> dict[str, Start]:
    """What each prompt starts from, as functions of the target's rows."""

    def plain() -> Cloze:
        return MaskedCloze(model=base).eval()

    def shared(data: ClozeDataModule) -> Cloze:
        module, start = plain(), str(output / "multitask" / "adapter")
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


def compare(
    begin: dict[str, Start], few: Callable[[int], ClozeDataModule], dev: ClozeDataModule, test: ClozeDataModule,
    steps: int, options: argparse.Namespace,
) -> dict[str, Any]:  # fmt: skip
    results: dict[str, Any] = {}
    for name, start in begin.items():
        found: dict[float, list[tuple[float, float]]] = {rate: [] for rate in options.rates}
        for seed in range(options.seeds):
            for rate in options.rates:
                torch.manual_seed(seed)
                module = trained(start(few(seed)), few(seed), steps, rate, seed)
                found[rate].append((measured(module, dev)[0], measured(module, test)[0]))
        rate = max(found, key=lambda rate: statistics.mean(d for d, _ in found[rate]))
        values = [round(t, 4) for _, t in found[rate]]
        spread = round(statistics.stdev(values), 4)
        results[name] = {"mean": round(statistics.mean(values), 4), "sd": spread, "runs": values, "rate": rate}
        results[name]["means by rate"] = {str(r): round(statistics.mean(t for _, t in v), 4) for r, v in found.items()}
        print(steps, name, results[name], flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lama", type=Path, default=LAMA, help="relations.jsonl, train, dev and test.jsonl")
    parser.add_argument("--sources", nargs="+", default=["P27", "P495", "P176", "P1412"], help="relations")
    parser.add_argument("--target", default="P17")
    parser.add_argument("--facts", type=int, default=200, help="of each source, and of the target's test")
    parser.add_argument("--lessons", type=int, default=8, help="epochs in which the encoder is taught")
    parser.add_argument("--epochs", type=int, default=8, help="of teachers and of the shared prompt")
    parser.add_argument("--length", type=int, default=8, help="virtual tokens")
    parser.add_argument("--rows", type=int, default=16, help="of the target")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 40], help="on the target, of 16 rows")
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-2, 5e-2], help="on the target")
    parser.add_argument("--source-rate", type=float, default=2e-2, help="of teachers and of the shared prompt")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the target's rows")
    parser.add_argument("--work", type=Path, help="folder to keep what is taught and trained before the target")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    start = time.perf_counter()
    known = {row["relation"]: row for row in read(options.lama, "relations")}
    with tempfile.TemporaryDirectory() as name:
        folder = options.work or Path(name)

        def asked(relation: str, rows: list[dict[str, str]], what: str, **settings: Any) -> ClozeDataModule:
            return questions(rows, by_hand(known[relation]).text, folder / f"{relation}_{what}.jsonl", **settings)

        every = {split: single_tokens(options.lama, split) for split in ("train", "dev", "test")}
        pool, dev, test = (of(every[split], options.target)[: options.facts] for split in every)
        told = {relation: of(every["train"], relation)[: options.facts] for relation in options.sources}
        told[options.target] = [*pool, *dev, *test]
        taught_in = [questions(rows, lesson(known[r]).text, folder / f"{r}_lesson.jsonl") for r, rows in told.items()]
        base = taught(taught_in, folder / "base", options.lessons)
        sources = {r: asked(r, told[r], "source", validation_fraction=0.1) for r in options.sources}
        training = Training(epochs=options.epochs, learning_rate=options.source_rate)
        shared = {"teachers": training, "multitask": training, "batch_size": 16, "trainer": {"accelerator": "cpu"}}
        output = folder / "mpt"
        reports = mpt(lambda: MaskedCloze(model=base), sources, {}, str(output), length=options.length, **shared)
        print(json.dumps(reports, indent=1), flush=True)

        @functools.cache
        def few(seed: int) -> ClozeDataModule:
            order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
            return asked(options.target, [pool[i] for i in order[: options.rows]], str(seed))

        begin = starts(base, output, options.sources, options.length)
        developed, tested = asked(options.target, dev, "dev"), asked(options.target, test, "test")
        found: dict[str, Any] = {
            f"after {steps} steps": compare(begin, few, developed, tested, steps, options) for steps in options.steps
        }
        untrained = {"MPT": begin["MPT"](tested), "model": MaskedCloze(model=base)}
        found["without target training"] = {k: round(measured(module, tested)[0], 4) for k, module in untrained.items()}
        usual = Counter(row["obj"] for row in test).most_common(1)[0][1]
        found["most frequent answer"] = round(usual / len(test), 4)
    what = " ".join(__doc__.split("\n\n", 1)[1].split())
    settings = {k: v for k, v in vars(options).items() if k not in ("lama", "work")} | {
        "seconds": round(time.perf_counter() - start)
    }
    teachers = {name: round(report["val_p_at_1"], 4) for name, report in reports.items()}
    harness.write({"what": what, "settings": settings, "sources' P@1": teachers, "target's P@1": found}, "mpt")


if __name__ == "__main__":
    main()
