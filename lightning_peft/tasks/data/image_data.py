"""``ImageDataModule``: images with a label, from folders, arrays or data sets."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft.tasks.data.images.image_pixels import augment, build_processor, pixels
from lightning_peft.tasks.data.images.image_splits import ImageRows, ImageSplits, Row
from lightning_peft.tasks.data.images.image_tables import ImageTable
from lightning_peft.tasks.data.reading.splits import Split
from lightning_peft.tasks.data.table_data import PortableDataModule
from lightning_peft.tasks.messages import quoted

_SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}


class ImageDataModule(PortableDataModule):
    """Images with a label, read when a batch asks for them and prepared as the model's own image processor does.

    A split is a folder with a folder of images for each class; a .npz file with arrays of 8-bit images and labels; or
    what `read_table` reads with a column of images: a folder that ``save_to_disk`` of HF datasets has written, or a
    data set of the hub. Train batches are flipped and moved at random after they were moved to the device, by torch's
    global generator: a run that goes on draws as one that never stopped, with any number of workers.

    Args:
        train: Images to train on; theirs are the classes.
        validation: Images to validate on. Without any, a share of the train images is held out.
        test: Images to test on.
        predict: Images to predict; they need no labels, and a folder of them no folders of classes.
        image: Column of the images, or name of their array.
        label: Column of the labels, or name of their array.
        model: The model whose preprocessing to use: a folder, package:name/folder, or a hub name; by default the one
            that is trained.
        image_size: Height and width to scale to, in place of the model's.
        mean: Mean of each channel from 0 to 1, in place of the model's.
        std: Deviation of each channel, in place of the model's.
        horizontal_flip: Whether to mirror half of the train images, drawn anew at each visit.
        crop_padding: Share of the side by which train images move at most; zeros come in. 0 for none.
        batch_size: Images per batch.
        num_workers: Processes that read and prepare images.
        limit_train: Train on the first images only, for a quick trial.
        limit_validation: Validate on the first images only.
        validation_fraction: Share of the train images to validate on when there are no others; 0 for none.

    Examples:
        >>> import numpy
        >>> from lightning_peft.tasks import ImageDataModule
        >>> numpy.savez("train.npz", image=numpy.zeros((4, 8, 8, 3), numpy.uint8), label=numpy.arange(4) % 2)
        >>> as_of_vit = {"image_size": 8, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
        >>> data = ImageDataModule("train.npz", validation_fraction=0, **as_of_vit)
        >>> data.setup("fit")
        >>> next(iter(data.train_dataloader()))["pixel_values"].shape
        torch.Size([4, 3, 8, 8])
    """

    def __init__(
        self,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        image: str = "image",
        label: str = "label",
        model: str | None = None,
        image_size: int | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        horizontal_flip: bool = True,
        crop_padding: float = 0.125,
        batch_size: int = 32,
        num_workers: int = 0,
        limit_train: int | None = None,
        limit_validation: int | None = None,
        validation_fraction: float = 0.1,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"Got batch_size={batch_size}, expected 1 or more.")
        if not 0 <= crop_padding < 1:
            raise ValueError(f"Got crop_padding={crop_padding}, expected a share from 0 to below 1, such as 0.125.")
        self.save_hyperparameters(logger=False)
        files: dict[Split, str | None] = {"train": train, "validation": validation, "test": test, "predict": predict}
        limits: dict[Split, int | None] = {"train": limit_train, "validation": limit_validation}
        self.splits = ImageSplits(files, limits, validation_fraction, image, label)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.classes: list[str] | None = None

    @cached_property
    def processor(self) -> Any:
        """The preprocessing of the model, loaded on first use."""
        trained: Any = getattr(self.trainer, "lightning_module", None)
        config = getattr(getattr(trained, "network", None), "config", None)
        reference = self.hparams["model"] or getattr(trained, "hparams", {}).get("model")
        own = {name: self.hparams[name] for name in ("image_size", "mean", "std")}
        return build_processor(reference, **own, trained_on=getattr(config, "image_size", None))

    def setup(self, stage: str) -> None:
        """Read what the stage needs; the train images decide on the classes."""
        self.processor  # noqa: B018  # loaded here, so that what is missing is said before the first batch
        for split in _SPLITS[stage]:
            if stage != "fit" or split == "train" or self.splits.has(split):
                self.splits.rows(split)
        if stage == "fit" or (stage != "predict" and self.classes is None and self.splits.has("train")):
            self._learn_classes()

    def collate(self, rows: list[Row]) -> dict[str, Tensor]:
        """The batch: ``pixel_values`` (rows, 3, height, width) and, unless it is to be predicted, ``labels``."""
        batch = {"pixel_values": pixels(self.processor, [image for image, _ in rows])}
        labels = [label for _, label in rows if label is not None]
        return {**batch, "labels": torch.tensor(labels)} if labels else batch

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Flip and move train images, in the process that trains and in the order of its steps."""
        if not getattr(self.trainer, "training", False):
            return batch
        images = augment(batch["pixel_values"], self.hparams["horizontal_flip"], self.hparams["crop_padding"])
        return {**batch, "pixel_values": images}

    def train_dataloader(self) -> DataLoader[Row]:
        """Shuffled batches of the train images, not augmented yet."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Row] | list[DataLoader[Row]]:
        """Batches of the validation images; an empty list without any."""
        return self._loader("validation") if self.splits.has("validation") else []

    def test_dataloader(self) -> DataLoader[Row]:
        """Batches of the test images."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Row]:
        """Batches of the images to predict."""
        return self._loader("predict")

    def _loader(self, split: Split) -> DataLoader[Row]:
        table: Any = self.splits.rows(split)
        return DataLoader(
            ImageRows(table, None if split == "predict" else self._indices(table)),
            batch_size=self.batch_size,
            shuffle=split == "train",
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=self.collate,
        )

    def _indices(self, table: ImageTable) -> list[int]:
        if self.classes is None:
            self._learn_classes()
        index = {name: number for number, name in enumerate(self.classes or ())}
        labels = [(table.labels or ())[position] for position in table.positions]
        unknown = sorted({label for label in labels if label not in index})
        if unknown:
            raise ValueError(
                f"{table.source!r} has images of {quoted(unknown)}, which the train images do not have. Known classes: "
                f"{quoted(index)}. Correct the labels, or train on such images."
            )
        return [index[label] for label in labels]

    def _learn_classes(self) -> None:
        train: ImageTable = self.splits.file("train")
        self._agree(list(train.classes), f"{train.source!r}")

    def _agree(self, classes: list[str], source: str) -> None:
        if self.classes not in (None, classes):
            raise ValueError(
                f"{source} has the classes {quoted(classes)}, but {quoted(self.classes or ())} are in use already. "
                "A trained classifier keeps its classes: use the images and the checkpoint that belong together."
            )
        self.classes = classes

    def state_dict(self) -> dict[str, Any]:
        """The classes."""
        return {"classes": self.classes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the classes of a checkpoint.

        Args:
            state_dict: As `state_dict` returned it.

        Raises:
            ValueError: If the train images have others.
        """
        if state_dict["classes"] is not None:
            self._agree(state_dict["classes"], "The checkpoint")
