"""python benchmarks/images.py --data FOLDER: adapts a small ResNet from six classes of CIFAR-10 to the other four.

No pretrained classifier of images that transformers reads is at hand without a network, so a ResNet (three stages of
two blocks) first learns airplane to dog from 1,200 images: full fine-tuning from random weights. Then LoRA on its
convolutions with a new head, the new head alone and full fine-tuning learn frog, horse, ship and truck from 800 images,
two seeds each, and full fine-tuning from random weights beside them. Each run is configs/image_classification.yaml
with the arguments that are printed. Writes results/images.json: mean accuracy on 400 test images, its standard
deviation over seeds, parameters that train, and seconds.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
import yaml
from lightning import Trainer

from lightning_peft.cli.main import main
from lightning_peft.tasks import ImageClassification, ImageDataModule

DATA = Path(__file__).parents[2] / "shared" / "data"
CONFIG = Path(__file__).parents[1] / "configs" / "image_classification.yaml"
RESNET = {"model_type": "resnet", "embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [2, 2, 2],
          "layer_type": "basic"}  # fmt: skip
SIZE = ["--data.image_size=48", "--data.num_workers=0"]
METHODS = {
    "LoRA and head": ["--peft.method=LoRA", "--peft.method.targets=[all-linear]", "--model.learning_rate=5e-3"],
    "head alone": [
        "--peft.method=OutputLayers",
        "--peft.method.targets=[head]",
        "--peft.also_train=[]",
        "--model.learning_rate=1e-2",
    ],
    "full": ["--peft.method=FullFineTuning", "--peft.also_train=[]", "--model.learning_rate=1e-3"],
}


def split(source: Path, folder: Path, limit: int | None) -> None:
    """Write base.npz with the first six classes, and new.npz with the other four."""
    with np.load(source) as file:
        for name, classes in (("base", range(6)), ("new", range(6, 10))):
            arrays = {"classes": file["classes"][list(classes)]}
            for part in ("train", "test"):
                chosen = np.isin(file[f"y_{part}"], list(classes)).nonzero()[0][:limit]
                arrays |= {f"x_{part}": file[f"x_{part}"][chosen], f"y_{part}": file[f"y_{part}"][chosen] - classes[0]}
            np.savez(folder / f"{name}.npz", **arrays)


def fit(name: str, folder: Path, *arguments: str) -> tuple[Path, float]:
    """Run the configuration; return the checkpoint, and the seconds."""
    text = yaml.safe_load(CONFIG.read_text())
    text["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False, "default_root_dir": str(folder / name)}
    text["trainer"]["callbacks"][0]["init_args"] = {}  # the last epoch is taken: no images are held out to choose one
    text["trainer"]["logger"]["init_args"] = {"save_dir": str(folder / name), "name": "", "version": ""}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(text))
    print(f"lightning-peft fit --config configs/image_classification.yaml {' '.join(arguments)}", flush=True)
    begin = time.perf_counter()
    main(["fit", "--config", str(folder / f"{name}.yaml"), "--data.validation_fraction=0", *SIZE, *arguments])
    return next((folder / name).rglob("*.ckpt")), round(time.perf_counter() - begin, 1)


def accuracy(path: Path, data: str) -> tuple[float, int]:
    module = ImageClassification.load_from_checkpoint(path)
    images = ImageDataModule(train=data, test=data, image_size=48, batch_size=100)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    (found,) = Trainer(accelerator="cpu", **quiet).test(module, images, verbose=False)
    return found["test_accuracy"], sum(p.numel() for p in module.parameters() if p.requires_grad)


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    split(options.data / "cifar10_small" / "cifar10_2000_1000.npz", folder, options.limit)
    base, new = str(folder / "base.npz"), str(folder / "new.npz")
    random = ["--model.model=null", f"--model.config={json.dumps(RESNET)}", *METHODS["full"]]
    path, seconds = fit("base", folder, *random, "--model.num_classes=6", f"--data.train={base}",
                        f"--trainer.max_epochs={options.epochs}")  # fmt: skip
    ImageClassification.load_from_checkpoint(path).network.save_pretrained(folder / "resnet")
    results: dict[str, Any] = {"base, six classes": {"accuracy": round(accuracy(path, base)[0], 4), "seconds": seconds}}
    print(results, flush=True)
    cases = {name: [f"--model.model={folder / 'resnet'}", *more] for name, more in METHODS.items()}
    for name, arguments in {**cases, "full, from random weights": random}.items():
        runs = []
        for seed in range(1, 1 + options.seeds):
            more = [f"--seed_everything={seed}", "--model.num_classes=4", f"--data.train={new}"]
            path, seconds = fit(
                f"{name}{seed}", folder, *arguments, *more, f"--trainer.max_epochs={options.epochs // 2}"
            )
            runs.append((*accuracy(path, new), seconds))
        found, trained, times = zip(*runs, strict=True)
        deviation = statistics.stdev(found) if len(found) > 1 else 0.0
        results[name] = {"accuracy": round(statistics.mean(found), 4), "deviation": round(deviation, 4),
                         "trained": trained[0], "seconds": statistics.median(times)}  # fmt: skip
        print(name, results[name], flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--epochs", type=int, default=20, help="of the base; half of them adapt")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--limit", type=int, default=None, help="images of each part, to see that it runs")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # which the command line interface looks at
    with tempfile.TemporaryDirectory() as folder:
        found = run(options, Path(folder))
    if options.limit is None:
        harness.write({"cifar10": found}, "images")
    columns = ["run", "accuracy", "deviation", "trained", "seconds"]
    print(harness.table([{"run": name, **row} for name, row in found.items()], columns))
