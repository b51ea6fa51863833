"""``extract`` computes the features of a frozen model, each row once."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor, nn

from ...core.eval_mode import evaluating
from .dataset_rows import Label, Rows
from .digests import model_digest, row_digest
from .feature_cache import FeatureCache
from .layer_outputs import captured, layer_name, run_before
from .pooling import Pooling, pool

FEATURES_FORMAT = 1
SHARD_ROWS, SHARD_BYTES = 1024, 64 * 2**20


@dataclass(frozen=True)
class Features:
    """What was read and computed.

    Args:
        values: (rows, features) of each split, in the order of its dataset.
        labels: Of the same rows.
        layer: Name of the layer.
        cache: Folder with the stored rows.
        computed: Number of different rows that were computed.
        cached: Number of different rows that were read.

    Examples:
        >>> from lightning_peft.recipes.features import Rows, extract
        >>> rows = Rows("train", [(torch.zeros(4), 0), (torch.ones(4), 1)], torch.utils.data.default_collate, "labels")
        >>> found = extract(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), [rows], "cache", layer="0", pooling=None)
        >>> found.values["train"].shape, found.labels["train"], found.layer
        (torch.Size([2, 3]), [0, 1], '0')
    """

    values: dict[str, Tensor]
    labels: dict[str, list[Label]]
    layer: str
    cache: Path
    computed: int
    cached: int


def extract(
    model: nn.Module,
    splits: Sequence[Rows],
    cache: str | os.PathLike[str],
    layer: int | str = -1,
    pooling: Pooling | None = "cls",
    batch_size: int = 64,
) -> Features:
    """Return the features of all rows, read from the cache where they are there, else computed and stored.

    Rows of one length share a batch, so that none is padded; equal rows are computed once. A run that ends early has
    stored all but its last shard.

    Args:
        model: Adapted or not, on the device to compute on; its modes are restored.
        splits: Datasets.
        cache: Folder of the caches of all models.
        layer: Number of a block, -1 for the last, or glob of a module's name.
        pooling: How a row's vectors become one; None where the layer gives one.
        batch_size: Rows per batch.

    Raises:
        ValueError: The layer cannot be captured or pooled, a row has no label, or features are not finite.

    Examples:
        >>> from lightning_peft.recipes.features import Rows, extract
        >>> rows = Rows("train", [(torch.zeros(4), 0), (torch.ones(4), 1)], torch.utils.data.default_collate, "labels")
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> for visit in range(2):
        ...     found = extract(model, [rows], "cache", layer="0", pooling=None)
        ...     print(found.values["train"].shape, found.computed, found.cached)
        torch.Size([2, 3]) 2 0
        torch.Size([2, 3]) 0 2
    """
    if batch_size < 1:
        raise ValueError(f"Got batch_size={batch_size}, expected 1 or more.")
    name = layer_name(model, layer)
    index = _Index(splits)
    with torch.inference_mode(), evaluating(model):
        embedding = _Embedding(model, name, pooling)
        example = embedding(splits[0], [splits[0].item(0)])
        store = FeatureCache(Path(cache), embedding.about(splits[0]))
        values = example.new_empty(len(index.places), example.shape[1])
        cached = set[int]()
        for numbers, rows in store.read(index.numbers):
            values[numbers] = rows
            cached |= set(numbers.tolist())
        missing = index.batches(set(range(len(values))) - cached, batch_size)
        shards = list(_shards(missing, example.element_size() * example.shape[1]))
        for shard in Tqdm(shards, desc="features", unit="shard", disable=None, leave=False):
            computed = torch.cat([embedding(index.rows(batch), index.items(batch)) for batch in shard])
            numbers = torch.tensor(list(itertools.chain(*shard)))
            _check_finite(computed, [index.places[n] for n in numbers], name)
            store.write([index.digests[n] for n in numbers], computed)
            values[numbers] = computed
    by_split = {rows.split: values[torch.tensor(index.order[rows.split])] for rows in splits}
    return Features(by_split, index.labels, name, store.folder, len(values) - len(cached), len(cached))


class _Embedding:
    """Computes features (rows, features) of items, in memory."""

    def __init__(self, model: nn.Module, layer: str, pooling: Pooling | None) -> None:
        self.model, self.layer, self.pooling = model, layer, pooling

    def __call__(self, rows: Rows, items: list[object]) -> Tensor:
        inputs = rows.inputs(rows.collate(items))
        mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
        return pool(captured(self.model, self.layer, inputs), mask, self.pooling).cpu()

    def about(self, rows: Rows) -> dict[str, object]:
        """Return the settings and digests that the features depend on."""
        called = run_before(self.model, self.layer, rows.inputs(rows.collate([rows.item(0)])))
        settings = {"format": FEATURES_FORMAT, "layer": self.layer, "pooling": self.pooling}
        return settings | {"model": type(self.model).__name__, "sha256": model_digest(self.model, self.layer, called)}


class _Index:
    """Numbers different rows: where each is read, and the digest by which it is found in the cache."""

    def __init__(self, splits: Sequence[Rows]) -> None:
        self.numbers: dict[bytes, int] = {}
        self.places: list[tuple[int, Rows, int]] = []  # position of the split, split, number in it
        self.lengths: list[int] = []
        self.order: dict[str, list[int]] = {}
        self.labels: dict[str, list[Label]] = {}
        for position, rows in enumerate(splits):
            if not len(rows):
                raise ValueError(f"The {rows.split} data has no rows; leave {rows.split!r} out of splits.")
            order, labels = self.order.setdefault(rows.split, []), self.labels.setdefault(rows.split, [])
            for i in range(len(rows)):
                digest, length, label = rows.read(i)
                number = self.numbers.setdefault(digest, len(self.places))
                if number == len(self.places):
                    self.places.append((position, rows, i))
                    self.lengths.append(length)
                order.append(number)
                labels.append(label)
        self.digests = list(self.numbers)

    def batches(self, numbers: Iterable[int], size: int) -> list[list[int]]:
        """Return batches of rows of one split and one length; of the rows of whole batches, these same batches."""
        kinds = {number: (self.places[number][0], self.lengths[number]) for number in numbers}
        groups = itertools.groupby(sorted(kinds, key=lambda n: (kinds[n], n)), kinds.__getitem__)
        runs = [list(group) for _, group in groups]
        return [group[i : i + size] for group in runs for i in range(0, len(group), size)]

    def rows(self, batch: Sequence[int]) -> Rows:
        """Return the split of a batch."""
        return self.places[batch[0]][1]

    def items(self, batch: Sequence[int]) -> list[object]:
        """Return the items of a batch, checked to be those that were seen before."""
        items = []
        for number in batch:
            _, rows, position = self.places[number]
            items.append(rows.item(position))
            if row_digest(rows.inputs(items[-1])) != self.digests[number]:
                raise ValueError(
                    f"Row {position} of {rows.split} differs each time it is read, so its features cannot be stored. "
                    "Take random augmentation out of the dataset."
                )
        return items


def _shards(batches: list[list[int]], row_bytes: int) -> Iterator[list[list[int]]]:
    """Yield runs of whole batches of bounded size: what is computed anew after a stop is batched as before."""
    limit = min(SHARD_ROWS, max(1, SHARD_BYTES // row_bytes))
    shard, count = list[list[int]](), 0
    for batch in batches:
        if shard and count + len(batch) > limit:
            yield shard
            shard, count = [], 0
        shard.append(batch)
        count += len(batch)
    if shard:
        yield shard


def _check_finite(features: Tensor, places: Sequence[tuple[int, Rows, int]], layer: str) -> None:
    bad = (~features.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        _, rows, row = places[bad[0]]
        raise ValueError(
            f"Features of {len(bad)} of {len(features)} rows are not finite, such as of row {row} of {rows.split}, "
            f"at layer {layer}. Check the weights and the row, or compute in float32."
        )
