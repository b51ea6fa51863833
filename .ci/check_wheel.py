"""Check an installed wheel without extras: its import, what it says of missing extras, a first adapter.

Run it by the Python of that environment. It works in temporary folders, where the repository's package is not found.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
OPTIONAL = ["bitsandbytes", "datasets", "flwr", "matplotlib", "peft", "PIL", "sklearn", "torchao", "transformers"]

# What a user runs, by the extra that the error must name.
PYTHON = {
    "text": "from lightning_peft.tasks import TextClassification as T; T(model='owner/name', num_classes=2)",
    "plots": "from lightning_peft.recipes.plot_callback import PlotCallback; PlotCallback()",
    "quantize": (
        "import lightning_peft as lp, torch; lp.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)), 'nf4', ['0'])"
    ),
    "vision": "from lightning_peft.tasks import ImageDataModule as D; D('.', '.', model='a/b').setup('fit')",
    "federated": "from lightning_peft.recipes.federated import engine; engine.flower()",
}
COMMANDS = {
    "fit --config configs/quickstart.yaml": "text",
    "fit --config configs/image_classification.yaml": "text",
    "features --config configs/recipes/features.yaml": "features",
    "mpt --config configs/recipes/mpt.yaml": "text",
}

# An own network, without transformers: the module, and the configuration that adapts it.
MODULE = """
import lightning as L, torch
from torch import nn

class Regression(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

class Data(L.LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(64, 8)
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), 16)
"""
CONFIGURATION = """
seed_everything: 1
model: {class_path: regression.Regression}
data: {class_path: regression.Data}
peft: {method: {class_path: LoRA, init_args: {rank: 2, targets: [net.0]}}, also_train: [net.2]}
trainer: {accelerator: cpu, max_epochs: 2, logger: false, enable_progress_bar: false, default_root_dir: out}
"""
LOADING = """
import torch
import lightning_peft as lp
from regression import Regression
torch.manual_seed(1)
module, (file,) = Regression(), __import__("pathlib").Path("out").rglob("*.ckpt")
keys = sorted(torch.load(file, weights_only=True)["state_dict"])
assert keys == ["net.0.peft.lora.a", "net.0.peft.lora.b", "net.2.bias", "net.2.weight"], keys
"""


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)


def console(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("lightning-peft")
    return run(str(script), *arguments, folder=folder)


def check_missing_extras(folder: Path) -> None:
    """Each error names the extra in its last line, which is no traceback for a command."""
    for extra, code in PYTHON.items():
        _check_names(run(sys.executable, "-c", code, folder=folder), extra, code)
    for name in ("configs", "examples"):
        shutil.copytree(REPOSITORY / name, folder / name)
    for command, extra in COMMANDS.items():
        outcome = console(*command.split(), folder=folder)
        assert "Traceback" not in outcome.stderr, outcome.stderr
        _check_names(outcome, extra, command)


def _check_names(outcome: subprocess.CompletedProcess[str], extra: str, what: str) -> None:
    last = outcome.stderr.strip().splitlines()[-1]
    assert outcome.returncode != 0, what
    assert f"lightning-peft[{extra}]" in last, (what, last)
    print(f"[{extra}] {last}")


def check_first_adapter(folder: Path) -> None:
    """An own module is adapted from a configuration, and its checkpoint holds the adapter alone."""
    (folder / "regression.py").write_text(MODULE)
    (folder / "run.yaml").write_text(CONFIGURATION)
    for arguments in (["--help"], ["fit", "--help"], ["fit", "--config", "run.yaml"]):
        outcome = console(*arguments, folder=folder)
        assert outcome.returncode == 0, outcome.stderr
    loaded = run(sys.executable, "-c", LOADING, folder=folder)
    assert loaded.returncode == 0, loaded.stderr


def import_seconds(module: str, folder: Path) -> float:
    code = f"import time; start = time.process_time(); import {module}; print(time.process_time() - start)"
    return statistics.median(float(run(sys.executable, "-c", code, folder=folder).stdout) for _ in range(3))


def main() -> None:
    """Run all checks; an assertion that fails says what was found."""
    installed = [name for name in OPTIONAL if importlib.util.find_spec(name)]
    assert not installed, f"The environment has optional packages: {installed}"
    print("lightning-peft", importlib.metadata.version("lightning-peft"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for module in ("lightning_peft", "lightning", "torch"):
            print(f"import {module}: {import_seconds(module, folder):.2f} s")
        check_missing_extras(folder)
        check_first_adapter(folder)
    print("A first adapter of an own module: trained, saved, found in its checkpoint.")


if __name__ == "__main__":
    main()
