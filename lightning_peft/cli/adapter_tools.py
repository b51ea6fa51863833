"""``AdapterTools``: the subcommands ``merge``, ``export`` and ``import``, as methods of a Trainer.

LightningCLI makes subcommands of Trainer methods; only so do they read the config file of a run, section by section,
and stand in ``lightning-peft --help``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import nn

from ..checkpoints.save_load import load_adapter, save_adapter
from ..composition.merge import merge
from ..composition.merge_files import merge_files
from ..core.adapter_folder import is_taken
from ..core.console import echo
from ..interop import export_peft, import_loralib, import_peft, import_t_few, push_adapter, vllm_problems
from ..interop.hub import check_hub
from ..interop.vllm import VERSION
from ..training.distributed import without_values
from ..training.lightning_checkpoint import inject_from_checkpoint
from .run_report import metrics_of, read_metrics_file


class AdapterTools:
    """Merges, exports and imports adapters; LightningCLI passes the model and the data of the config."""

    def merge(
        self,
        model: pl.LightningModule,
        adapter: str,
        output: str,
        base: str | None = None,
        datamodule: pl.LightningDataModule | None = None,
    ) -> None:
        """Fold an adapter into the base weights and write a plain model.

        Args:
            model: The module with the base weights, or without them if base is given.
            adapter: Folder that save_adapter wrote, or a checkpoint of a run with PEFTStrategy.
            output: Folder to write: a transformers model if the module holds one, else model.safetensors.
            base: Safetensors file, or folder of the base: merged file by file, one layer in memory at a time.
            datamodule: Not used.
        """
        if base is not None:
            with without_values():
                model.configure_model()
            echo(f"merged model: {merge_files(model, base, adapter, output)}")
            return
        target = _new(output)
        _adapt(model, Path(adapter))
        merge(model)
        _write_model(model, target)
        echo(f"merged model: {target}")

    def export(
        self,
        model: pl.LightningModule,
        adapter: str,
        output: str,
        datamodule: pl.LightningDataModule | None = None,
        format: Literal["peft"] = "peft",
        name: str | None = None,
        metrics: str | None = None,
        push_to: str | None = None,
        private: bool | None = None,
    ) -> None:
        """Write an adapter as HF PEFT does, with a model card, and say what vLLM takes of it.

        Args:
            model: The module with the base weights.
            adapter: Folder that save_adapter wrote, or a checkpoint of a run with PEFTStrategy.
            output: Folder to write.
            datamodule: Not used.
            format: Whose format.
            name: Name of the method, where the adapter has several.
            metrics: JSON file of numbers for the card; by default the report.json of the run that wrote the adapter.
            push_to: Where on the hub to push it, as user/name.
            private: Whether a new repository there is private.

        Raises:
            ValueError: A setting of push_to is given without it, or a name is not known.
        """
        target, source = _new(output), Path(adapter)
        if push_to is not None:
            check_hub(push_to)
        elif private is not None:
            raise ValueError(f"private={private} is a setting of push_to, which is not given.")
        results = metrics_of(source) if metrics is None else read_metrics_file(Path(metrics))
        _adapt(model, source)
        folder = export_peft(model, target, name, results)
        said = vllm_problems(folder) or [f"vLLM {VERSION} takes it as it is, if it takes adapters of the base's class."]
        echo("\n".join([f"{format} adapter: {folder}", f"model card: {len(results)} metrics", *said]))
        if push_to is not None:
            echo(f"pushed: {push_adapter(folder, push_to, private)}")

    def import_adapter(
        self,
        model: pl.LightningModule,
        adapter: str,
        output: str,
        datamodule: pl.LightningDataModule | None = None,
        format: Literal["peft", "loralib", "t-few"] = "peft",
        alpha: float | None = None,
        parts: list[str] | None = None,
    ) -> None:
        """Read another library's adapter and write it as save_adapter does.

        Args:
            model: The module with the base weights.
            adapter: Folder of HF PEFT, or checkpoint of loralib (or LitGPT) or T-Few.
            output: Folder to write.
            datamodule: Not used.
            format: Whose format.
            alpha: The lora_alpha of training, which a checkpoint of loralib does not hold.
            parts: Of fused layers in a checkpoint of loralib, what was adapted; by default query and value.

        Raises:
            ValueError: A setting is missing, or is none of this format.
        """
        target = _new(output)
        if (alpha is not None or parts is not None) and format != "loralib":
            raise ValueError(f"alpha and parts are settings of format=loralib, and the format is {format}.")
        model.configure_model()
        if format == "peft":
            import_peft(model, adapter)
        elif format == "t-few":
            import_t_few(model, adapter)
        else:
            _import_loralib(model, adapter, alpha, parts)
        echo(f"adapter: {save_adapter(model, target)}")


# The subcommand is called import, a keyword of Python, so that `def` cannot define it.
setattr(AdapterTools, "import", AdapterTools.import_adapter)


def _new(output: str) -> Path:
    target = Path(output)
    if is_taken(target):
        raise FileExistsError(f"{output} is not empty; choose a new folder.")
    return target


def _adapt(model: pl.LightningModule, adapter: Path) -> None:
    """Build the network of a module, inject an adapter and load it."""
    model.configure_model()
    if adapter.is_dir():
        load_adapter(model, adapter)
        return
    if not adapter.is_file():
        raise FileNotFoundError(f"{adapter} is neither a folder that save_adapter wrote nor a checkpoint.")
    checkpoint = torch.load(adapter, map_location="cpu", weights_only=True)
    inject_from_checkpoint(model, checkpoint)
    model.load_state_dict(checkpoint["state_dict"])


def _import_loralib(model: nn.Module, path: str, alpha: float | None, parts: Sequence[str] | None) -> None:
    if alpha is None:
        raise ValueError("A checkpoint of loralib does not hold its scale; give alpha, the lora_alpha of training.")
    import_loralib(model, path, alpha, **({} if parts is None else {"parts": parts}))


def _write_model(model: pl.LightningModule, target: Path) -> None:
    from safetensors.torch import save_model

    savers = [part for part in model.children() if callable(getattr(part, "save_pretrained", None))]
    target.mkdir(parents=True, exist_ok=True)
    if len(savers) == 1:
        saver: Any = savers[0]
        saver.save_pretrained(target)
        return
    save_model(model, str(target / "model.safetensors"))
