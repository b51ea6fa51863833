from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer, seed_everything
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy

import lightning_peft as lp
from lightning_peft.tasks import Cloze, ClozeDataModule

Write = Callable[..., str]
PEOPLE = [f"person{i}" for i in range(64)]
HOMES, BOSSES = [f"town{i}" for i in range(6)], [f"boss{i}" for i in range(6)]
WORDS = ["home", "chief", "of", "is", "lives", "in", "the", "big", "city"]
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
SPECIAL["mask_token"] = "[MASK]"  # noqa: S105
MASK = 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, then the words."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("cloze")
    words = [*SPECIAL.values(), *WORDS, *PEOPLE, *HOMES, *BOSSES]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL["unk_token"]))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=built, model_max_length=128, **SPECIAL).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def masked(bert: dict[str, Any]) -> dict[str, Any]:
    quick = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}
    return {**bert, **quick, "vocab_size": 5 + len([*WORDS, *PEOPLE, *HOMES, *BOSSES]), "pad_token_id": 0}


@pytest.fixture
def homes(write: Write) -> str:
    return write("homes.jsonl", [{"who": p, "answer": HOMES[i % 6]} for i, p in enumerate(PEOPLE[:6])])


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    settings = {"enable_checkpointing": False, "accelerator": "cpu", **quiet, **settings}
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **settings)


def test_rows_hold_pseudo_tokens_words_a_mask_and_the_answers_id(homes: str, tokenizer: str) -> None:
    data = ClozeDataModule("[P:2] home of {who} [P] is {mask}", homes, tokenizer=tokenizer, validation_fraction=0)
    words = data.tokenizer.get_vocab()
    row = data.examples("train")[3]
    inside = [words["home"], words["of"], words["person3"], -1, words["is"], MASK]
    assert row == {"input_ids": [2, -1, -1, *inside, 3], "attention_mask": [1] * 10, "labels": words["town3"]}
    assert "labels" not in ClozeDataModule("{who} {mask}", predict=homes, tokenizer=tokenizer).examples("predict")[0]


def test_loss_and_answers_are_those_at_the_mask(
    homes: str, tokenizer: str, masked: dict[str, Any], tmp_path: Path
) -> None:
    module = Cloze(config=masked, tokenizer=tokenizer).eval()
    data = ClozeDataModule("{who} lives in {mask}", homes, test=homes, tokenizer=tokenizer, candidates=HOMES)
    (results,) = trainer(tmp_path).test(module, data, verbose=False)
    rows = data.examples("test")
    x, y = (torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        logits = module.network.eval()(x).logits[x == MASK]
    assert results["test_loss"] == pytest.approx(cross_entropy(logits, y).item(), rel=1e-5)
    town = data.tokenizer.get_vocab()["town0"]
    chosen = logits[:, town : town + 6].argmax(1) + town
    assert results["test_p_at_1"] == pytest.approx((chosen == y).float().mean().item())
    module.candidates = []
    assert torch.equal(module._answers(logits, {}), logits.argmax(1))


@pytest.mark.slow
def test_a_trained_model_predicts_answers_as_words(
    homes: str, tokenizer: str, masked: dict[str, Any], tmp_path: Path
) -> None:
    seed_everything(0, verbose=False)
    data = ClozeDataModule(
        "[P:2] {who} [P] {mask}", homes, validation=homes, predict=homes, tokenizer=tokenizer, batch_size=3
    )
    module = Cloze(config=masked, learning_rate=2e-3)
    strategy = lp.PEFTStrategy([lp.PTuning(template="[P:2] {who} [P] {mask}"), lp.FullFineTuning()], show_summary=False)
    run = trainer(tmp_path, strategy, max_epochs=80, check_val_every_n_epoch=80)
    run.fit(module, data)
    assert run.callback_metrics["val_p_at_1"] == 1
    batches = run.predict(module, data)
    assert [word for batch in batches for word in batch["answers"]] == HOMES
    assert all(batch["probabilities"].min() > 0.5 for batch in batches)


LONG = [{"who": "person0", "answer": "town1"}, {"who": "person1", "answer": "big city"}]


def test_answers_of_several_tokens_are_refused_or_dropped_with_their_number(tokenizer: str, write: Write) -> None:
    path, settings = write("long.jsonl", LONG), {"tokenizer": tokenizer, "validation_fraction": 0}
    with pytest.raises(ValueError, match=r"1 of 2 answers of .* not one token \(row 2\)\. .* long_answers=drop"):
        ClozeDataModule("{who} {mask}", path, **settings).examples("train")
    with pytest.warns(UserWarning, match=r"1 of 2 answers .* left out"):
        assert len(ClozeDataModule("{who} {mask}", path, long_answers="drop", **settings).examples("train")) == 1
    path = write("all.jsonl", LONG[1:])
    with pytest.raises(ValueError, match="1 of 1 answers"):
        ClozeDataModule("{who} {mask}", path, long_answers="drop", **settings).examples("train")


def test_words_stand_for_labels_which_may_share_one(tokenizer: str, write: Write) -> None:
    path = write("labels.jsonl", [{"who": f"person{label}", "label": label} for label in (0, 1, 2)])
    settings = {"answer": "label", "tokenizer": tokenizer, "validation_fraction": 0}
    words = {"0": "town0", "1": "town1", "2": "town0"}
    data = ClozeDataModule("{who} {mask}", path, words=words, **settings)
    known = data.tokenizer.get_vocab()
    assert [row["labels"] for row in data.examples("train")] == [known[f"town{i}"] for i in (0, 1, 0)]
    assert data.candidate_ids() == [known["town0"], known["town1"]]
    with pytest.raises(ValueError, match=r"label in row 3 that no word stands for\. Words stand for '0', '1'\."):
        ClozeDataModule("{mask}", path, words={"0": "town0", "1": "town1"}, **settings).examples("train")
    with pytest.raises(ValueError, match="expected one of them"):
        ClozeDataModule("{mask}", path, words=words, candidates=HOMES)


def test_what_cannot_be_asked_is_refused(homes: str, tokenizer: str, write: Write) -> None:
    with pytest.raises(ValueError, match=r"has 0 masks, expected one \{mask\}"):
        ClozeDataModule("{who} [P]", homes)
    with pytest.raises(ValueError, match="two answers or more"):
        ClozeDataModule("{who} {mask}", homes, candidates=["town1"])
    with pytest.raises(ValueError, match="no column 'person'"):
        ClozeDataModule("{person} {mask}", homes, tokenizer=tokenizer, validation_fraction=0).examples("train")
    data = ClozeDataModule("{who} {mask}", homes, tokenizer=tokenizer, candidates=HOMES[:2], validation_fraction=0)
    with pytest.raises(ValueError, match=r"rows 3, 4, 5, 6 that is no candidate. Candidates: 'town0', 'town1'"):
        data.examples("train")
    with pytest.raises(ValueError, match="candidates 'big city' are not one token"):
        ClozeDataModule("{who} {mask}", homes, tokenizer=tokenizer, candidates=["town1", "big city"]).candidate_ids()
    masked = write("masked.jsonl", [{"who": "the [MASK]", "answer": "town1"}])
    with pytest.raises(ValueError, match=r"mask token '\[MASK\]' in a field in row 1"):
        ClozeDataModule("{who} {mask}", masked, tokenizer=tokenizer, validation_fraction=0).examples("train")
    with pytest.raises(ValueError, match="Give Cloze a tokenizer"):
        _ = Cloze(config={"model_type": "bert", "hidden_size": 12, "vocab_size": 9, "num_hidden_layers": 1}).tokenizer


@pytest.mark.slow
def test_p_tuning_finds_more_facts_than_another_wording_by_hand(
    tokenizer: str, masked: dict[str, Any], write: Write, tmp_path: Path
) -> None:
    """A model is taught two facts of each person; P-tuning learns to ask for one of them from half of the people."""
    seed_everything(0, verbose=False)
    lives = torch.randint(6, (64,)).tolist()
    works = torch.randint(6, (64,)).tolist()
    taught = [{"what": "home", "who": p, "answer": HOMES[i]} for p, i in zip(PEOPLE, lives, strict=True)]
    facts = [{"who": fact["who"], "answer": fact["answer"]} for fact in taught]
    taught += [{"what": "chief", "who": p, "answer": BOSSES[i]} for p, i in zip(PEOPLE, works, strict=True)]
    lesson = ClozeDataModule("{mask} is the {what} of {who}", write("taught.jsonl", taught), tokenizer=tokenizer)
    lesson.splits.validation_fraction = 0
    module = Cloze(config=masked, tokenizer=tokenizer, learning_rate=3e-3)
    trainer(tmp_path, max_epochs=60, limit_val_batches=0).fit(module, lesson)
    train, test = write("half.jsonl", facts[:32]), write("rest.jsonl", facts[32:])

    def asked(template: str, epochs: int, *callbacks: Any) -> float:
        data = ClozeDataModule(
            template, train, test=test, tokenizer=tokenizer, batch_size=8, validation_fraction=0, answer="answer"
        )
        run = trainer(tmp_path, *callbacks, max_epochs=epochs, limit_val_batches=0)
        if epochs:
            run.fit(module, data)
        (results,) = run.test(module, data, verbose=False)
        return results["test_p_at_1"]

    known, by_hand = asked("{mask} is the home of {who}", 0), asked("{who} lives in the city {mask}", 0)
    template = "{mask} [P:4] {who}"
    before = {name: value.clone() for name, value in module.network.state_dict().items()}
    tuned = asked(template, 60, lp.PEFTStrategy(lp.PTuning(template=template), show_summary=False))
    print(f"P@1 of 32 facts: {by_hand:.3f} by hand, {tuned:.3f} by P-tuning, {known:.3f} as they were taught")
    with lp.full_state_dict(module):
        state = module.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in before.items())
    assert known > 0.9
    assert tuned > by_hand + 0.2
