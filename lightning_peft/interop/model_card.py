"""``render_card`` writes the model card of an exported adapter: its method, base, metrics and how to load it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.adapter_folder import read_files
from ..files.storage import Location, joined
from . import vllm
from .peft_format import StateDict

CARD = "README.md"
_MOST_NAMES = 50  # of classes in the code for loading; more are in a file beside the card
_MARK = "<!-- lightning_peft writes this file; digest "
_PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
}


@dataclass(frozen=True)
class CardFacts:
    """Facts for a card that the config and the tensors of the folder do not hold.

    Args:
        method: Class name and settings.
        kind: Class of the base model, and whether transformers has it.
        classes: Number of classes that its head tells apart, if it classifies.
        base: Fingerprint of the base.
        task: What HF PEFT calls the base model's task.
        rows: (label, number of modules, parameters) of each trained group.
        total: Parameters of the adapted model.
        metrics: Results by name.
        class_names: Names of these classes, if they have names.
    """

    method: Mapping[str, Any]
    kind: tuple[str, bool]
    classes: int | None
    base: str | None
    task: str | None
    rows: tuple[tuple[str, int, int], ...]
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    class_names: Sequence[str] | None = None


def check_card_replaceable(folder: Location) -> None:
    """Raise where a card would replace one that somebody else wrote or edited.

    Raises:
        FileExistsError: There is one.
    """
    card = read_files(folder, (CARD,)).get(CARD)
    if card is not None and not _is_generated(card.decode(errors="replace")):
        raise FileExistsError(
            f"{joined(folder, CARD)} was written or edited by somebody else and would be lost. Move it, export into "
            f"another folder, or pass model_card=False to keep it."
        )


def _is_generated(text: str) -> bool:
    body, _, mark = text.rpartition(_MARK)
    return mark == f"{_digest(body)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def render_card(facts: CardFacts, config: Mapping[str, Any], tensors: StateDict, size: int) -> str:
    """Return the card of a folder, given its config, its tensors and the size of their file in bytes."""
    method, name = facts.method["method"], base_name(config)
    parts = [
        _front_matter(facts, config),
        f"# {method} for {name or facts.kind[0]}",
        f"An adapter in the format of HF PEFT, written by lightning_peft. It belongs to {_base(facts, name)}, whose "
        "weights it does not hold.",
        "## Method",
        markdown_table(
            (method, ""), *((key, json.dumps(value)) for key, value in facts.method.items() if key != "method")
        ),
        "## Parameters",
        _parameters(facts, size),
        *(("## Metrics", markdown_table(("metric", "value"), *_metrics(facts))) if facts.metrics else ()),
        "## Loading",
        _loading(facts, name),
        f"## vLLM {vllm.VERSION}",
        _serving(config, tensors, name),
    ]
    body = "\n\n".join(parts) + "\n\n"
    return f"{body}{_MARK}{_digest(body)} -->\n"


def base_name(config: Mapping[str, Any]) -> str | None:
    """Return the base model's name on the hub; None where it is a folder of somebody's machine, or not known."""
    name = config.get("base_model_name_or_path") or ""
    return name if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).exists() else None


def markdown_table(head: tuple[str, ...], *rows: tuple[str, ...]) -> str:
    """Return rows as Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _front_matter(facts: CardFacts, config: Mapping[str, Any]) -> str:
    name, pipeline = base_name(config), _PIPELINES.get(facts.task or "")
    tags = ["lightning-peft", config["peft_type"].lower().replace("_", "-")]
    entries = {
        **({"base_model": name} if name else {}),
        "library_name": "peft",
        **({"pipeline_tag": pipeline} if pipeline else {}),
        "tags": [*tags, f"base_model:adapter:{name}"] if name else tags,
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in entries.items()]  # JSON is YAML, too
    return "\n".join(["---", *lines, "---"])


def _base(facts: CardFacts, name: str | None) -> str:
    described = f"`{name}` ({facts.kind[0]})" if name else f"a {facts.kind[0]}"
    return described + (f" of fingerprint `{facts.base}`" if facts.base else "")


def _parameters(facts: CardFacts, size: int) -> str:
    trained = sum(count for *_, count in facts.rows)
    share = 100 * trained / max(1, facts.total)
    rows = [(label, f"{places:,}", f"{count:,}") for label, places, count in facts.rows]
    rows.append(("all of these", "", f"{trained:,} of {facts.total:,} ({share:.3g} %)"))
    return markdown_table(("trained", "places", "parameters"), *rows) + f"\n\nThe file of tensors takes {size:,} bytes."


def _metrics(facts: CardFacts) -> list[tuple[str, str]]:
    return [(name, f"{value:.6g}") for name, value in facts.metrics.items()]


def _loading(facts: CardFacts, name: str | None) -> str:
    class_name, in_transformers = facts.kind
    classes = "" if facts.classes is None else f", num_labels={facts.classes}"
    if classes and facts.class_names is not None and len(facts.class_names) <= _MOST_NAMES:
        named = ", ".join(f"{number}: {json.dumps(name)}" for number, name in enumerate(facts.class_names))
        classes = f", id2label={{{named}}}"
    load_base = [
        f"from transformers import {class_name}",
        "",
        f'model = {class_name}.from_pretrained("{name or "path/to/base"}"{classes})',
    ]
    lines = load_base if in_transformers else [f"model = ...  # the {class_name}"]
    code = "\n".join([*lines, 'folder = "path/to/this/folder"  # of the hub: huggingface_hub.snapshot_download(...)'])
    return (
        f"```python\n{code}\n```\n\nWith lightning_peft:\n\n"
        f"```python\nimport lightning_peft as lp\n\nlp.import_peft(model, folder)\n```\n\nWith peft:\n\n"
        f"```python\nfrom peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, folder)\n```"
    )


def _serving(config: Mapping[str, Any], tensors: StateDict, name: str | None) -> str:
    problems = "\n".join(f"- {sentence}" for sentence in vllm.describe_problems(config, tensors))
    if vllm.list_refusals(config, tensors):
        return f"{problems}\n- Merged into the base model, it is served like any model: `lightning-peft merge`."
    arguments = [f"{key} {value}" for key, (value, _) in vllm.server_options(config, tensors).items()]
    command = [
        "vllm serve",
        name or "path/to/base",
        "--enable-lora",
        *arguments,
        "--lora-modules adapter=path/to/this/folder",
    ]
    usage = f"```\n{' '.join(command)}\n```\n\nThe base model's class in vLLM must take adapters."
    return f"{problems}\n\n{usage}" if problems else usage
