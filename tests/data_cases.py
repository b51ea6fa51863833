"""The data modules of the ready tasks, over tiny tables and a tiny tokenizer, for laws that each of them obeys."""

import json
import random
from pathlib import Path

from lightning_peft.tasks.data.chat_data import ChatDataModule
from lightning_peft.tasks.data.cloze_data import ClozeDataModule
from lightning_peft.tasks.data.instructions import InstructionDataModule
from lightning_peft.tasks.data.mixed_data import MixedDataModule
from lightning_peft.tasks.data.multiple_choice_data import ChoicesDataModule
from lightning_peft.tasks.data.seq2seq_data import Seq2SeqDataModule
from lightning_peft.tasks.data.text_data import TextDataModule
from lightning_peft.tasks.data.token_data import TokenDataModule

WORDS = ["good", "bad", "film", "plot", "the", "a", "was", "ending", "red", "blue"]
SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask", "eos")}
SIZES = {"tokenizer": "tokenizer", "max_length": 64, "batch_size": 4, "validation_fraction": 0}


def save_tokenizer(folder, words=tuple(WORDS), **settings):
    """Save a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **{**SPECIAL, **settings})
    fast.save_pretrained(folder)


def save_rows(path, count=48, seed=0):
    """Save rows that each data module can read, of very different length."""
    draw = random.Random(seed)  # noqa: S311
    rows = []
    for number in range(count):
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 30)))
        row = {"text": text, "label": ["neg", "pos"][number % 2], "answer": draw.choice(WORDS), "instruction": text}
        row |= {"choices": draw.sample(WORDS, 2), "number": number % 2, "tokens": text.split()}
        row |= {"tags": ["B" if word in WORDS[:4] else "O" for word in text.split()], "half": number / 2}
        row |= {"more_tokens": row["tokens"][::-1], "more_tags": row["tags"][::-1]}
        rows.append({**row, "output": " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))})
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(folder):
    """Save a tokenizer and tables."""
    save_tokenizer(f"{folder}/tokenizer")
    save_tokenizer(f"{folder}/ending", eos_token=SPECIAL["sep_token"])  # which it writes at the end
    save_rows(f"{folder}/train.jsonl")
    save_rows(f"{folder}/other.jsonl", 24, seed=1)


def _paths(folder, settings):
    files = {n: f"{folder}/{settings[n]}" for n in ("train", "validation", "tokenizer") if settings.get(n)}
    return {**settings, **files}


def _text(folder, **settings):
    return TextDataModule(**_paths(folder, {"train": "train.jsonl", **SIZES, **settings}))


def _instructions(folder, **settings):
    return InstructionDataModule(
        **_paths(folder, {"train": "train.jsonl", "input": None, "prompt_style": "plain", **SIZES, **settings})
    )


def _streamed(folder, **settings):
    return _instructions(folder, streaming=True, **settings)


def _streamed_text(folder, **settings):
    """Plain text, of which a row becomes several examples."""
    tokenizer = {**SIZES, "max_length": 12}
    named = {"train": "train.jsonl", "text": "text", "streaming": True}
    return ChatDataModule(**_paths(folder, {**named, **tokenizer, **settings}))


def _scores(folder, **settings):
    return _text(folder, **{"problem_type": "regression", "label": "number", **settings})


def _tokens(folder, **settings):
    return TokenDataModule(**_paths(folder, {"train": "train.jsonl", **SIZES, **settings}))


def _seq2seq(folder, **settings):
    lengths = {
        "max_source_length": 64,
        "max_target_length": 16,
        "source": "text",
        "target": "output",
        "tokenizer": "ending",
    }
    sizes = {name: size for name, size in SIZES.items() if name != "max_length"}
    return Seq2SeqDataModule(**_paths(folder, {"train": "train.jsonl", **sizes, **lengths, **settings}))


def _cloze(folder, **settings):
    return ClozeDataModule(**_paths(folder, {"train": "train.jsonl", "template": "{text} {mask}", **SIZES, **settings}))


def _choices(folder, num_workers=0, **settings):
    """Choices draw their wordings from the generator that checkpoints keep, and so have no workers."""
    asked = {"templates": {"a": "{text} is", "b": "was {text} good ?"}, "answers": {"neg": "bad", "pos": "good"}}
    return ChoicesDataModule(**_paths(folder, {"train": "train.jsonl", **asked, **SIZES, **settings}))


def _mixed(folder, **settings):
    tasks = {"one": _text(folder), "two": _text(folder, train="other.jsonl")}
    return MixedDataModule(tasks, batch_size=4, **settings)


DATA = {
    "text": _text,
    "scores": _scores,
    "tokens": _tokens,
    "seq2seq": _seq2seq,
    "instructions": _instructions,
    "instructions, streamed": _streamed,
    "text in pieces, streamed": _streamed_text,
    "cloze": _cloze,
    "choices": _choices,
    "mixed": _mixed,
}
