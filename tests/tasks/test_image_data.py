from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from installed import needs

from lightning_peft.tasks import ImageDataModule
from lightning_peft.tasks.data.images.image_pixels import augment, build_processor, pixels

pytestmark = needs("PIL")
PLAIN = {"horizontal_flip": False, "crop_padding": 0.0, "validation_fraction": 0.0}


def noise(count: int, size: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture
def arrays(tmp_path: Path) -> tuple[str, np.ndarray]:
    images = noise(6)
    names = {"x_train": images[:4], "y_train": np.array([1, 0, 1, 0], np.uint8), "x_test": images[4:]}
    path = tmp_path / "images.npz"
    np.savez(path, **names, y_test=np.array([[1], [1]]), classes=np.array(["cat", "dog"]))
    return str(path), images


@pytest.fixture
def folder(tmp_path: Path) -> str:
    from PIL import Image

    for number, image in enumerate(noise(4)):
        path = tmp_path / "folder" / ("dog" if number % 2 else "cat") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return str(tmp_path / "folder")


def normalized(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((images / 255 - 0.5) / 0.5).float().permute(0, 3, 1, 2)


def test_arrays_are_read_by_split_with_the_names_of_their_classes(arrays: tuple[str, np.ndarray]) -> None:
    path, images = arrays
    data = ImageDataModule(train=path, test=path, predict=path, **PLAIN)
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
    assert data.classes == ["cat", "dog"]
    (batch,) = data.test_dataloader()
    assert torch.allclose(batch["pixel_values"], normalized(images[4:]), atol=1e-6)
    assert batch["labels"].tolist() == [1, 1]
    (batch,) = data.train_dataloader()
    assert sorted(batch["labels"].tolist()) == [0, 0, 1, 1]
    (batch,) = data.predict_dataloader()
    assert set(batch) == {"pixel_values"}


@pytest.mark.parametrize(("write", "wanted"), [
    (lambda images: {"images": images.transpose(0, 3, 1, 2), "labels": np.array(["b", "a", "b"])}, lambda x: x),
    (lambda images: {"train_images": images[..., 0], "train_labels": np.array([9, 10, 9])},
     lambda x: x[..., :1].repeat(3, axis=3)),
])  # fmt: skip
def test_arrays_may_have_channels_first_be_grey_and_have_other_names(write: Any, wanted: Any, tmp_path: Path) -> None:
    images = noise(3)
    np.savez(tmp_path / "x.npz", **write(images))
    data = ImageDataModule(train=str(tmp_path / "x.npz"), **PLAIN)
    data.setup("fit")
    assert data.classes in (["a", "b"], ["9", "10"])
    torch.manual_seed(0)
    (batch,) = data.train_dataloader()
    order = batch["pixel_values"][:, 0, 0, 0].argsort()
    expected = normalized(wanted(images))
    assert torch.allclose(batch["pixel_values"][order], expected[expected[:, 0, 0, 0].argsort()], atol=1e-6)


def test_a_folder_of_folders_names_the_classes(folder: str) -> None:
    data = ImageDataModule(train=folder, validation=folder, predict=folder, **PLAIN)
    data.setup("fit")
    assert data.classes == ["cat", "dog"]
    (batch,) = data.val_dataloader()
    images = noise(4)
    assert torch.allclose(batch["pixel_values"], normalized(images[[0, 2, 1, 3]]), atol=1e-6)
    assert batch["labels"].tolist() == [0, 0, 1, 1]
    (batch,) = data.predict_dataloader()
    assert len(batch["pixel_values"]) == 4


def test_what_the_library_has_saved_is_read_with_the_order_of_its_classes(tmp_path: Path) -> None:
    import datasets
    from PIL import Image

    images = noise(3)
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["dog", "cat"])})
    rows = {"photo": [Image.fromarray(image) for image in images], "kind": [1, 0, 1]}
    saved = datasets.Dataset.from_dict(rows, features=features)
    saved.to_parquet(tmp_path / "rows.parquet")
    data = ImageDataModule(train=str(tmp_path / "rows.parquet"), image="photo", label="kind", **PLAIN)
    data.setup("fit")
    assert data.classes == ["dog", "cat"]
    torch.manual_seed(0)
    (batch,) = data.train_dataloader()
    order = batch["labels"].tolist()
    assert sorted(order) == [0, 1, 1]
    dog = batch["pixel_values"][order.index(0)]
    assert torch.allclose(dog, normalized(images[1:2])[0], atol=1e-6)
    wrong = ImageDataModule(train=str(tmp_path / "rows.parquet"), label="kind", **PLAIN)
    with pytest.raises(ValueError, match="has no column 'image'. Its columns: 'photo', 'kind'"):
        wrong.setup("fit")


def test_images_are_prepared_as_the_models_own_processor_does(tmp_path: Path, arrays: tuple[str, np.ndarray]) -> None:
    from transformers import AutoImageProcessor

    own = {"image_processor_type": "ViTImageProcessor", "size": {"height": 12, "width": 12}, "resample": 3}
    written = {**own, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "do_resize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    path, images = arrays
    data = ImageDataModule(test=path, train=path, model=str(tmp_path))
    (batch,) = data.test_dataloader()
    wanted = AutoImageProcessor.from_pretrained(tmp_path)([*images[4:]], return_tensors="pt")["pixel_values"]
    assert wanted.shape == (2, 3, 12, 12)
    assert torch.equal(batch["pixel_values"], wanted)
    data = ImageDataModule(test=path, train=path, model=str(tmp_path), image_size=6, mean=[0.5] * 3)
    (batch,) = data.test_dataloader()
    assert batch["pixel_values"].shape == (2, 3, 6, 6)
    assert list(data.processor.image_mean) == [0.5] * 3
    assert list(data.processor.image_std) == [0.5, 0.6, 0.7]


def test_a_processor_that_scales_the_shorter_side_and_crops_gets_other_sizes_in_its_form(tmp_path: Path) -> None:
    from PIL import Image

    own = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 24}, "do_center_crop": True}
    written = {**own, "crop_size": {"height": 24, "width": 24}, "do_resize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    wide = [Image.fromarray(noise(1)[0]).resize((16, 8)), Image.fromarray(noise(1)[0])]
    for size in (None, 12):
        processor = build_processor(str(tmp_path), size, None, None, None)
        assert pixels(processor, wide).shape == (2, 3, size or 24, size or 24)


def test_without_a_size_images_stay_as_they_are_and_must_be_alike(tmp_path: Path) -> None:
    from PIL import Image

    different = [Image.fromarray(noise(1, size)[0]) for size in (8, 9)]
    assert pixels(build_processor(None, None, None, None, None), different[:1]).shape == (1, 3, 8, 8)
    assert pixels(build_processor(None, None, None, None, 16), different).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"differ in size after .* \(8, 8\) and \(9, 9\). Set image_size"):
        pixels(build_processor(None, None, None, None, None), different)


def test_augmentation_flips_half_and_moves_within_the_padding() -> None:
    images = torch.arange(1.0, 1 + 400 * 16).view(400, 1, 4, 4)
    torch.manual_seed(0)
    flipped = augment(images, flip=True, share=0)
    is_flipped = (flipped == images.flip(-1)).flatten(1).all(1)
    assert ((flipped == images).flatten(1).all(1) ^ is_flipped).all()
    assert 160 < is_flipped.sum() < 240
    moved = augment(images, flip=False, share=0.25)
    padded = torch.nn.functional.pad(images, [1] * 4)
    places = [[(moved[i] == padded[i, :, y : y + 4, x : x + 4]).all() for y in range(3) for x in range(3)]
              for i in range(400)]  # fmt: skip
    counts = torch.tensor(places).sum(0)
    assert counts.sum() == 400
    assert counts.min() > 20
    assert torch.equal(augment(images, flip=False, share=0), images)


def test_the_classes_of_a_checkpoint_are_kept(arrays: tuple[str, np.ndarray], folder: str, tmp_path: Path) -> None:
    data = ImageDataModule(train=arrays[0], **PLAIN)
    data.setup("fit")
    again = ImageDataModule(test=folder, **PLAIN)
    again.load_state_dict(data.state_dict())
    again.setup("test")
    assert [batch["labels"].tolist() for batch in again.test_dataloader()] == [[0, 0, 1, 1]]
    (Path(folder) / "dog").rename(Path(folder) / "fox")
    with pytest.raises(ValueError, match="has images of 'fox', which the train images do not have. Known .* 'dog'"):
        ImageDataModule(train=arrays[0], validation=folder, **PLAIN).val_dataloader()
    other = ImageDataModule(train=folder, **PLAIN)
    other.load_state_dict(data.state_dict())
    with pytest.raises(ValueError, match="has the classes 'cat', 'fox', but 'cat', 'dog' are in use already"):
        other.setup("fit")


def read(data: ImageDataModule) -> None:
    data.setup("fit")
    list(data.train_dataloader())


def test_what_cannot_be_read_is_refused(tmp_path: Path, folder: str) -> None:
    def refused(message: str, name: str, **settings: Any) -> None:
        with pytest.raises(ValueError, match=message):
            read(ImageDataModule(**{**PLAIN, **settings, "train": str(tmp_path / name)}))

    np.savez(tmp_path / "float.npz", images=noise(2) / 255, labels=np.array([0, 1]))
    refused("images of type float64 and shape .2, 8, 8, 3., expected uint8", "float.npz")
    np.savez(tmp_path / "no.npz", a=noise(2), labels=np.array([0, 1]))
    refused("has the arrays 'a', 'labels', expected one of 'image', 'images', 'x_train', .* by image", "no.npz")
    np.savez(tmp_path / "few.npz", images=noise(2), labels=np.array([0]))
    refused("has 2 images and 1 labels", "few.npz")
    np.savez(tmp_path / "more.npz", images=noise(2), labels=np.array([0, 2]), classes=np.array(["a", "b"]))
    refused("names 2 classes, so labels are to be whole numbers from 0 to 1, but some are 0, 2", "more.npz")
    (tmp_path / "above").mkdir()
    Path(folder).rename(tmp_path / "above" / "train")
    refused("has the folders 'train' without images, .* give each as its own split", "above")
    (tmp_path / "above" / "train" / "dog" / "x.png").write_text("no image")
    refused("The image '.*x.png' cannot be read .* Repair or remove it", "above/train")
    with pytest.raises(ValueError, match="crop_padding=2, expected a share from 0 to below 1"):
        ImageDataModule(crop_padding=2)
