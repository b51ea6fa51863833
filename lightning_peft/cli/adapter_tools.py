"""``AdapterTools``: the subcommands ``merge``, ``export`` and ``import``, as methods of a Trainer.

LightningCLI makes subcommands of Trainer methods; only so do they read the config file of a run, section by section,
and stand in ``lightning-peft --help``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
from torch import nn

from ..checkpoints.reader import read_checkpoint
from ..checkpoints.save_load import load_adapter, save_adapter
from ..composition.merge import merge
from ..composition.merge_files import merge_files
from ..core.console import echo
from ..files.atomic_files import replace_files
from ..files.storage import check_local, is_file, is_folder, is_remote, is_taken
from ..interop import export_peft, import_loralib, import_peft, import_t_few, push_adapter, vllm_problems
from ..interop.hub import check_hub
from ..interop.vllm import VERSION
from ..training.distributed import without_values
from ..training.lightning_checkpoint import inject_from_checkpoint
from .adapter_companions import files_beside, files_of_data, name_merged_classes
from .merged_model import how_to_load, write_model
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
        allow_nonfinite: bool = False,
    ) -> None:
        """Fold an adapter into the base weights and write a plain model.

        Of a transformers model, the folder has the tokenizer of the adapter's folder or else the base's, its templates,
        the names of classes and the base's type of weights; transformers, pipelines and vLLM read it as it is.

        Args:
            model: The module with the base weights, or without them if base is given.
            adapter: Folder that save_adapter wrote, or a checkpoint of a run with PEFTStrategy.
            output: Folder to write: a transformers model if the module holds one, else model.safetensors.
            base: Safetensors file, or folder of the base: merged file by file, one layer in memory at a time.
            datamodule: Whose tokenizer is written where neither the adapter's folder nor the base has one.
            allow_nonfinite: Whether to merge an adapter that holds NaN or infinity.
        """
        if base is not None:
            with without_values():
                model.configure_model()
            folder = merge_files(model, base, adapter, output, allow_nonfinite=allow_nonfinite)
            name_merged_classes(folder, adapter)
            replace_files(folder, files_beside(adapter))
            echo("\n".join([f"merged model: {folder}", *how_to_load(folder, model)]))
            return
        target = check_local(_new(output), "a merged model is written into files in place")
        _adapt(model, adapter)
        merge(model, allow_nonfinite=allow_nonfinite)
        write_model(model, target, adapter, datamodule)
        echo("\n".join([f"merged model: {target}", *how_to_load(target, model)]))

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
        allow_nonfinite: bool = False,
    ) -> None:
        """Write an adapter as HF PEFT does, with a model card, and say what vLLM takes of it.

        Args:
            model: The module with the base weights.
            adapter: Folder that save_adapter wrote, or a checkpoint of a run with PEFTStrategy.
            output: Folder to write.
            datamodule: Whose tokenizer is written where the adapter's folder has none.
            format: Whose format.
            name: Name of the method, where the adapter has several.
            metrics: JSON file of numbers for the card; by default the report.json of the run that wrote the adapter.
            push_to: Where on the hub to push it, as user/name.
            private: Whether a new repository there is private.
            allow_nonfinite: Whether to write an adapter that holds NaN or infinity.

        Raises:
            ValueError: A setting of push_to is given without it, or a name is not known.
        """
        target = _new(output)
        if push_to is not None:
            check_hub(push_to)
        elif private is not None:
            raise ValueError(f"private={private} is a setting of push_to, which is not given.")
        found = {} if metrics is not None or is_remote(adapter) else metrics_of(Path(adapter))
        results = found if metrics is None else read_metrics_file(Path(metrics))
        _adapt(model, adapter)
        companions = files_beside(adapter) or files_of_data(model, datamodule)
        folder = export_peft(model, target, name, results, allow_nonfinite=allow_nonfinite)
        replace_files(folder, companions)
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


def _new(output: str) -> str:
    if is_taken(output):
        raise FileExistsError(f"{output} is not empty; choose a new folder.")
    return output


def _adapt(model: pl.LightningModule, adapter: str) -> None:
    """Build the network of a module, inject an adapter and load it."""
    model.configure_model()
    if is_folder(adapter):
        load_adapter(model, adapter)
        return
    if not is_file(adapter):
        raise FileNotFoundError(f"{adapter} is neither a folder that save_adapter wrote nor a checkpoint.")
    checkpoint = read_checkpoint(adapter)
    inject_from_checkpoint(model, checkpoint)
    model.load_state_dict(checkpoint["state_dict"])


def _import_loralib(model: nn.Module, path: str, alpha: float | None, parts: Sequence[str] | None) -> None:
    if alpha is None:
        raise ValueError("A checkpoint of loralib does not hold its scale; give alpha, the lora_alpha of training.")
    import_loralib(model, path, alpha, **({} if parts is None else {"parts": parts}))
