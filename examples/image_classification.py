"""python examples/image_classification.py: a folder of images for each class, and a convolutional net of transformers.

LoRA on its convolutions, with the ready task `ImageClassification`. The same from the command line:
lightning-peft fit --config configs/image_classification.yaml --data.train FOLDER --model.num_classes 3
"""

import random
from pathlib import Path

import lightning as L
from PIL import Image, ImageDraw

import lightning_peft as lp
from lightning_peft.tasks import ImageClassification, ImageDataModule

SHAPES = ("disk", "square", "triangle")


def draw(shape: str) -> Image.Image:
    """Draw a shape of any size and colour, anywhere on grey."""
    image = Image.new("RGB", (32, 32), (random.randint(90, 160),) * 3)
    radius = random.randint(7, 11)
    x, y = random.randint(radius, 31 - radius), random.randint(radius, 31 - radius)
    box, pen = (x - radius, y - radius, x + radius, y + radius), ImageDraw.Draw(image)
    color = random.choice([(250, 80, 60), (60, 220, 90), (70, 90, 250), (240, 240, 80)])
    if shape == "disk":
        pen.ellipse(box, color)
    elif shape == "square":
        pen.rectangle(box, color)
    else:
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], color)
    return image


def write(folder: Path, count: int) -> str:
    """Write `count` images of each class, each class into a folder of its name."""
    for shape in SHAPES:
        (folder / shape).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            draw(shape).save(folder / shape / f"{number}.png")
    return str(folder)


if __name__ == "__main__":
    L.seed_everything(1)
    images = Path("runs/image_classification/images")
    data = ImageDataModule(
        image_size=32,
        train=write(images / "train", 160),
        test=write(images / "test", 40),
        predict=write(images / "new", 1),
    )
    settings = {"model_type": "resnet", "num_channels": 3, "embedding_size": 16, "hidden_sizes": [16, 32, 48],
                "depths": [1, 1, 1], "layer_type": "basic"}  # fmt: skip
    model = ImageClassification(config=settings, num_classes=len(SHAPES), learning_rate=1e-2)  # or model=FOLDER_OR_NAME

    strategy = lp.PEFTStrategy(lp.LoRA(rank=8, targets=["all-linear"]), also_train=["classifier"])
    trainer = L.Trainer(max_epochs=12, accelerator="cpu", callbacks=[strategy], logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(model, data)
    accuracy = trainer.test(model, data, verbose=False)[0]["test_accuracy"]
    print(f"accuracy on {40 * len(SHAPES)} other images: {accuracy:.1%}")

    lp.save_adapter(model, "runs/image_classification/adapter")
    answers = trainer.predict(model, data)[0]
    for name, probabilities in zip(answers["labels"], answers["probabilities"], strict=True):
        print(f"a new image: {name}, with a probability of {max(probabilities):.0%}")
