"""``features`` extracts the features of a frozen model and fits a classifier of scikit-learn to them."""

from __future__ import annotations

import io
import operator
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric import Fabric
from lightning.pytorch import LightningDataModule, LightningModule
from torch import nn

from ...checkpoints.save_load import load_adapter
from ...core.adapter_folder import write_json
from ...files.atomic_files import replace_file
from ...tasks.pretrained import build_model
from .dataset_rows import LabelledSplit, Rows, rows_of
from .estimators import build_estimator
from .extraction import Features, extract
from .pooling import Pooling


def features(
    model: nn.Module | str,
    data: LightningDataModule,
    layer: int | str = -1,
    pooling: Pooling | None = "cls",
    classifier: dict[str, Any] | None = None,
    adapter: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    batch_size: int = 64,
    accelerator: str = "auto",
    splits: Sequence[LabelledSplit] = ("train", "validation", "test"),
    label: str = "labels",
    cache: str = "runs/features/cache",
    output: str = "runs/features",
) -> dict[str, Any]:
    """Fit a classifier on features of a frozen model, which are computed once and kept on disk.

    Args:
        model: A transformers model (folder, package:name/folder or hub name), or the class path of any module.
        data: Where the rows come from, in the order of its datasets.
        layer: Which layer gives the features: the number of a block, -1 for the last, or a glob of a module's name.
        pooling: Which vector of a row counts: of the first token (cls), the mean, of the last token; null where the
            layer gives one vector per row.
        classifier: class_path and init_args of a scikit-learn classifier; LogisticRegression(max_iter=1000) if null.
        adapter: Folder of an adapter to load into the model first.
        dtype: Type to compute and store features in.
        batch_size: Rows per batch.
        accelerator: Where to compute: auto, cpu, gpu and so on, as Lightning names them.
        splits: Splits to read; the classifier is fitted on train and scored on all.
        label: Key of the label in a row that is a dict; of a tuple, the last part is the label.
        cache: Folder that keeps features of all models.
        output: Folder to write report.json and classifier.joblib to.

    Returns:
        The report.

    Examples:
        >>> from lightning_peft.recipes.features import features
        >>> dataset = torch.utils.data.TensorDataset(torch.arange(12.0).view(6, 2), torch.arange(6) // 3)
        >>> data = L.LightningDataModule.from_datasets(dataset)
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> report = features(model, data, layer="0", pooling=None, accelerator="cpu", splits=["train"])
        >>> report["rows"], report["features"]["width"]
        ({'train': 6, 'computed': 6, 'cached': 0}, 3)
    """
    if "train" not in splits or len(set(splits)) != len(splits):
        raise ValueError(f"Got splits={list(splits)}, expected 'train' and, once each, others to score on.")
    estimator = build_estimator(classifier)
    start = time.perf_counter()
    network = _network(model, adapter, dtype).to(Fabric(accelerator=accelerator, devices=1).device)
    found = extract(network, _rows(data, splits, label), cache, layer, pooling, batch_size)
    computed = time.perf_counter()
    matrices = {split: values.float().numpy() for split, values in found.values.items()}
    _check_classes(found)
    estimator.fit(matrices["train"], found.labels["train"])
    fitted = time.perf_counter()
    accuracy = {split: _accuracy(estimator, x, found.labels[split]) for split, x in matrices.items()}
    report = {
        "accuracy": accuracy,
        "rows": {split: len(x) for split, x in matrices.items()} | {"computed": found.computed, "cached": found.cached},
        "seconds": {"features": round(computed - start, 3), "fit": round(fitted - computed, 3)},
        "features": {"layer": found.layer, "pooling": pooling, "dtype": dtype, "width": matrices["train"].shape[1]},
        "classifier": str(estimator),
        "cache": str(found.cache),
        "output": output,
        "versions": {name: version(name) for name in ("torch", "scikit-learn", "lightning-peft")},
    }
    _write(Path(output), report, estimator)
    return report


def _network(model: nn.Module | str, adapter: str | None, dtype: Literal["float32", "bfloat16"]) -> nn.Module:
    network = build_model("AutoModel", model, None, dtype) if isinstance(model, str) else model
    if isinstance(network, LightningModule):
        network.configure_model()
    network.to(getattr(torch, dtype))
    return network if adapter is None else load_adapter(network, adapter)


def _rows(data: LightningDataModule, splits: Sequence[LabelledSplit], label: str) -> list[Rows]:
    data.prepare_data()
    data.setup("fit")
    if "test" in splits:
        data.setup("test")
    return [rows_of(data, split, label) for split in splits]


def _check_classes(found: Features) -> None:
    classes = set(found.labels["train"])
    if len(classes) < 2:
        raise ValueError(
            f"All {len(found.labels['train'])} train rows have the label {classes.pop()!r}; give others too."
        )


def _accuracy(estimator: Any, x: Any, labels: Sequence[Any]) -> float:
    right: int = sum(map(operator.eq, estimator.predict(x).tolist(), labels))
    return right / len(labels)


def _write(folder: Path, report: dict[str, Any], estimator: Any) -> None:
    import joblib

    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    joblib.dump(estimator, buffer)
    replace_file(folder / "classifier.joblib", buffer.getvalue())
    write_json(folder / "report.json", report)
