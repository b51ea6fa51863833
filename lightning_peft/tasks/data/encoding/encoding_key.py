"""``encoding_key`` names encoded rows by all that they depend on: rows, settings, code, tokenizer and versions."""

from __future__ import annotations

import hashlib
import importlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import LightningDataModule

from lightning_peft.tasks.data.encoding.code_version import code_version
from lightning_peft.tasks.data.reading.row_cache import hf_datasets
from lightning_peft.tasks.data.reading.tables import Table

if TYPE_CHECKING:
    from lightning_peft.tasks.data.table_data import TableDataModule

_PACKAGES = ("lightning_peft", "datasets", "tokenizers", "transformers")


def encoding_key(data: TableDataModule, split: str, table: Table) -> str | None:
    """A name for the encoded rows of a split; None if what they depend on is not known.

    Known are the settings of data that call ``save_hyperparameters``, their public attributes, and their code where it
    is in files: an interactive session may change any of it.

    Args:
        data: Whose rows they are.
        split: That of the rows.
        table: The rows.
    """
    code = code_version(type(data))
    if not data.hparams or code is None or table.version is None:
        return None
    batching = {*data.batching_settings, *vars(LightningDataModule())}
    settings = {**data.hparams, **{name: value for name, value in vars(data).items() if not name.startswith("_")}}
    settings = {name: value for name, value in settings.items() if name not in batching}
    versions = [importlib.import_module(name).__version__ for name in _PACKAGES]
    key = [
        _rows(table),
        split,
        data.state_dict(),
        _tokenizer(data.tokenizer),
        code,
        versions,
    ]
    hashed: str = hf_datasets().fingerprint.Hasher.hash([key, sorted(settings.items())])
    return hashed


def _rows(table: Table) -> list[str | None]:
    positions = table.positions
    rows = (
        repr(positions) if isinstance(positions, range) else hashlib.sha256(np.asarray(positions).tobytes()).hexdigest()
    )
    return [table.version, rows]


def _tokenizer(tokenizer: Any) -> list[Any]:
    """Return what a tokenizer writes of itself: vocabulary, added tokens, normalization, template and settings."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    written = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    written = written[max(0, written.find('"added_tokens"')) :]  # before it are lengths that the last call has set
    settings = {name: str(value) for name, value in tokenizer.init_kwargs.items()}
    names = ("padding_side", "truncation_side", "model_max_length", "special_tokens_map", "chat_template")
    return [type(tokenizer).__name__, written, settings, [str(getattr(tokenizer, name, None)) for name in names]]
