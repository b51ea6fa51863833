"""One whole training in this process, by one side: what benchmarks/whole_runs.py starts. Prints its costs as JSON."""

import argparse
import json
import logging
import resource
import time
import warnings
from pathlib import Path
from typing import Any

LLAMA = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 688}
LLAMA |= {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False}
LORA = {"lora_alpha": 16, "r": 8}  # as peft writes it; its targets are names of layers
BATCH = {"classification": 16, "instructions": 8}
PACKED, LONGEST = 2, 512  # rows in a batch of packed ones, which then has about as many tokens, and their length
RATE = 1e-3


class Clock:
    """CPU seconds from here, after all imports, to the first step, and from there to the end of the last."""

    def __init__(self) -> None:
        self.start, self.first, self.last, self.steps = time.process_time(), None, None, 0

    def begin(self, *args: Any, **kwargs: Any) -> None:
        self.first = self.first or time.process_time()

    def end(self, *args: Any, **kwargs: Any) -> None:
        self.last, self.steps = time.process_time(), self.steps + 1

    def costs(self) -> dict[str, float]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        return {"setup": self.first - self.start, "cpu": self.last - self.first, "steps": self.steps, "peak MB": peak}


def our_classification(options: argparse.Namespace) -> tuple[Any, Any, list[str]]:
    """Return the module, its data, and what trains beside adapters."""
    from lightning_peft.tasks import TextClassification, TextDataModule

    file, size = str(options.folder / "sentences.jsonl"), BATCH["classification"]
    module = TextClassification(model=options.model, num_classes=2, learning_rate=RATE)
    data = TextDataModule(train=file, validation_fraction=0.0, model=options.model, batch_size=size, max_length=128)
    return module, data, ["classifier"]


def our_instructions(options: argparse.Namespace, size: int = BATCH["instructions"]) -> tuple[Any, Any, list[str]]:
    """Return the module, its data, and what trains beside adapters."""
    from lightning_peft.tasks import CausalLM, InstructionDataModule

    file, tokenizer = str(options.folder / "instructions.jsonl"), str(options.folder / "tokenizer")
    module = CausalLM(config=LLAMA | {"vocab_size": options.vocabulary}, learning_rate=RATE)
    limits = {"max_length": LONGEST, "batch_size": size, "validation_fraction": 0.0}
    return module, InstructionDataModule(train=file, tokenizer=tokenizer, **limits), []


OURS = {"classification": our_classification, "instructions": our_instructions}


def strategy(also_train: list[str]) -> Any:
    import lightning_peft as lp

    targets = ["attention.query", "attention.value"]
    return lp.PEFTStrategy(lp.LoRA(rank=8, alpha=16, targets=targets), also_train, show_summary=False)


def train_ours(options: argparse.Namespace) -> Clock:
    import datasets  # noqa: F401  # before the clock starts, as on the other sides
    import lightning.pytorch as pl
    import transformers.modeling_utils  # noqa: F401  # which peft and the other Trainers import, too
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer  # noqa: F401

    import lightning_peft.tasks  # noqa: F401

    clock = Clock()
    pl.seed_everything(0, verbose=False)
    module, data, also_train = OURS[options.job](options)
    timing = pl.callbacks.LambdaCallback(on_train_batch_start=clock.begin, on_train_batch_end=clock.end)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings = {"accelerator": "cpu", "max_epochs": 1, "callbacks": [strategy(also_train), timing]}
    pl.Trainer(default_root_dir=options.folder, **quiet, **settings).fit(module, data)
    return clock


def timed(clock: Clock) -> Any:
    from transformers import TrainerCallback

    return type("Timing", (TrainerCallback,), {"on_step_begin": clock.begin, "on_step_end": clock.end})()


def arguments(options: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    """Return what both of the others' Trainers are given."""
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    size = {"per_device_train_batch_size": batch_size, "num_train_epochs": 1, "learning_rate": RATE}
    return {"output_dir": str(options.folder / "out"), "use_cpu": True, "dataloader_pin_memory": False, **quiet, **size}


def train_hf(options: argparse.Namespace) -> Clock:
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    clock = Clock()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    cache = str(options.folder / f"cache {time.time()}")  # as of a first run
    rows = load_dataset("json", data_files=str(options.folder / "sentences.jsonl"), split="train", cache_dir=cache)
    rows = rows.map(lambda row: tokenizer(row["text"], truncation=True, max_length=128), batched=True)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], **LORA))
    settings = TrainingArguments(**arguments(options, BATCH["classification"]))
    Trainer(model, settings, train_dataset=rows, processing_class=tokenizer, callbacks=[timed(clock)]).train()
    return clock


def train_trl(options: argparse.Namespace) -> Clock:
    """Train with loss on the response alone, on rows that have their tokens already."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    clock, packing = Clock(), options.side == "packing"
    cache = str(options.folder / f"cache {time.time()}")
    rows = load_dataset("json", data_files=str(options.folder / "tokens.jsonl"), split="train", cache_dir=cache)
    settings = arguments(options, PACKED if packing else BATCH["instructions"])
    settings |= {"bf16": False, "gradient_checkpointing": False, "max_length": LONGEST, "packing": packing}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA, vocab_size=options.vocabulary))
    SFTTrainer(
        model,
        SFTConfig(**settings, completion_only_loss=True),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(options.folder / "tokenizer"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **LORA),
        callbacks=[timed(clock)],
    ).train()
    return clock


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Write a tokenizer with an end token and, for TRL, the rows as tokens; return how many tokens there are."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.add_special_tokens({"eos_token": "[SEP]"})
    tokenizer.save_pretrained(options.folder / "tokenizer")
    _, data, _ = our_instructions(options, size=1)
    data.setup("fit")
    batches = list(data.train_dataloader())
    rows = [(batch["input_ids"][0].tolist(), (batch["labels"][0] != -100).tolist()) for batch in batches]
    lines = [json.dumps({"input_ids": ids, "completion_mask": list(map(int, mask))}) for ids, mask in rows]
    (options.folder / "tokens.jsonl").write_text("\n".join(lines) + "\n")
    return {"tokens": sum(len(ids) for ids, _ in rows), "labelled": sum(sum(mask) for _, mask in rows)}


def first_losses(options: argparse.Namespace) -> dict[str, float]:
    """Return the loss of each side on one batch, with the same base and new adapters, before any training."""
    import peft
    import transformers

    module, data, _ = OURS[options.job](options)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    kind = "SequenceClassification" if options.job == "classification" else "CausalLM"
    targets = ["query", "value"] if options.job == "classification" else ["q_proj", "v_proj"]
    other = getattr(transformers, f"AutoModelFor{kind}").from_config(module.network.config)
    other.load_state_dict(module.network.state_dict())
    other = peft.get_peft_model(other, peft.LoraConfig(target_modules=targets, **LORA)).eval()
    strategy([]).apply(module)
    module.log = module.log_dict = lambda *args, **kwargs: None
    loss = module.eval().training_step(batch, 0)
    theirs = other(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    return {"ours": float(loss["loss"] if isinstance(loss, dict) else loss), "theirs": float(theirs)}


TRAIN = {"ours": train_ours, "hf": train_hf, "trl": train_trl, "packing": train_trl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=[*TRAIN, "prepare", "losses"])
    parser.add_argument("job", choices=list(OURS))
    parser.add_argument("--folder", type=Path, required=True, help="of the rows; files of a run go there, too")
    parser.add_argument("--model", required=True, help="folder of MiniLM")
    parser.add_argument("--vocabulary", type=int, default=30522)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.side in TRAIN:
        found = TRAIN[options.side](options).costs()
    else:
        found = prepare(options) if options.side == "prepare" else first_losses(options)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
