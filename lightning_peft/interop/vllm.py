"""``vllm_problems`` says why vLLM 0.33.0 refuses a HF PEFT folder, by its peft_helper.py and lora_model.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..files.storage import Location
from .peft_folder import read_peft_folder
from .peft_format import StateDict

VERSION = "0.33.0"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # choices of --max-lora-rank (vllm/config/lora.py)
DEFAULT_RANK = 16
_HEADS = ("classifier", "score")
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte")  # names in the embedding_modules of some model of vLLM
_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")  # initialisations that leave the base as it is
_TENSORS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
_SETTINGS = {  # settings that vLLM knows and refuses
    "use_dora": "DoRA (use_dora)",
    "lora_bias": "biases of B (lora_bias)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "layer_replication": "layer_replication",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "use_qalora": "QALoRA (use_qalora)",
}


def vllm_problems(folder: Location) -> list[str]:
    """Return, in sentences, why vLLM refuses an adapter, or which options its server needs; none if it takes it as is.

    Args:
        folder: What ``export_peft`` or HF PEFT wrote.

    Raises:
        FileNotFoundError: The folder is no adapter.
        ValueError: A file is damaged, or the folder is none of HF PEFT.

    Examples:
        >>> model = lp.inject(nn.Sequential(nn.Linear(16, 8)), lp.IA3(targets=["0"], feedforward_targets=[]))
        >>> lp.vllm_problems(lp.export_peft(model, "for-peft"))
        ['vLLM loads LoRA alone, and this is IA3.']
    """
    config, tensors = read_peft_folder(folder)
    return describe_problems(config, tensors)


def describe_problems(config: Mapping[str, Any], tensors: StateDict) -> list[str]:
    """Return what ``vllm_problems`` says of a folder's content."""
    if refusals := list_refusals(config, tensors):
        return refusals
    sentences = [
        f"Start its server with {key} {value}: {why}." for key, (value, why) in server_options(config, tensors).items()
    ]
    if config.get("target_parameters"):
        sentences.append(
            f"Adapters of experts (target_parameters) were not tried with vLLM {VERSION}; compare its answers before "
            f"it serves them."
        )
    if patterns := [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]:
        settings = " and ".join(patterns)
        sentences.append(
            f"vLLM {VERSION} reads {settings}; versions that do not read it scale all layers by lora_alpha / r."
        )
    return sentences


def list_refusals(config: Mapping[str, Any], tensors: StateDict) -> list[str]:
    """Return why vLLM refuses an adapter whatever its options are."""
    if config["peft_type"] != "LORA":
        return [f"vLLM loads LoRA alone, and this is {config['peft_type']}."]
    refusals = list(_of_settings(config))
    return refusals or list(_of_tensors(config, tensors))


def server_options(config: Mapping[str, Any], tensors: StateDict) -> dict[str, tuple[int, str]]:
    """Return the values that options of vLLM's server need for an adapter that it does not refuse, and why."""
    needed = dict[str, tuple[int, str]]()
    rank = _rank(config)
    if rank > DEFAULT_RANK:
        choices = ", ".join(str(choice) for choice in RANKS)
        value = min(choice for choice in RANKS if choice >= rank)
        needed["--max-lora-rank"] = (value, f"rank {rank} is above its default of {DEFAULT_RANK}; it takes {choices}")
    for key, tensor in tensors.items():
        if _is_head(key) and key.endswith(".weight"):
            needed["--max-lora-cls-labels"] = (len(tensor), "the base that it serves may have fewer classes")
    return needed


def _rank(config: Mapping[str, Any]) -> int:
    return max(int(rank) for rank in [config.get("r", 8), *(config.get("rank_pattern") or {}).values()])


def _of_settings(config: Mapping[str, Any]) -> Iterator[str]:
    for key, feature in _SETTINGS.items():
        if config.get(key):
            yield f"vLLM refuses {feature}."
    if config.get("bias", "none") != "none":
        yield f"vLLM refuses biases that train (bias={config['bias']!r})."
    saved = config.get("modules_to_save") or []
    if len(saved) > 1 or any(module not in _HEADS for module in saved):
        yield (
            f"Of whole modules (modules_to_save) vLLM takes one head, named {' or '.join(_HEADS)}, not "
            f"{', '.join(saved)}."
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _STARTS:
        yield f"vLLM refuses init_lora_weights={init!r}, which changes the base's weights; export_peft writes none."
    if _rank(config) > RANKS[-1]:
        yield f"Rank {_rank(config)} is above {RANKS[-1]}, the largest that vLLM takes."
    if config.get("fan_in_fan_out"):
        yield "The base has transposed weights as GPT-2 has, whose class in vLLM takes no adapters."


def _of_tensors(config: Mapping[str, Any], tensors: StateDict) -> Iterator[str]:
    saved = bool(config.get("modules_to_save"))
    if unknown := [key for key in tensors if not key.endswith(_TENSORS) and not (saved and _is_head(key))]:
        yield (
            f"vLLM has no place for {', '.join(unknown[:3])}. Merge the adapter and serve the whole model: "
            "lightning-peft merge --config CONFIG --adapter ADAPTER --output merged, or lightning_peft.merge(model). "
            "Or train and export an adapter without it."
        )
    kernels = [key.partition(".lora_A")[0] for key, value in tensors.items() if ".lora_A" in key and value.dim() > 2]
    if kernels:
        yield f"vLLM adapts linear layers and embeddings, not the convolution {kernels[0]}."
    tables = {key.split(".")[-2] for key in tensors if key.endswith(_TENSORS[2:])} - {*_EMBEDDINGS}
    if tables:
        yield f"vLLM adapts embeddings named {', '.join(_EMBEDDINGS)} alone, not {', '.join(sorted(tables))}."


def _is_head(key: str) -> bool:
    parts = key.split(".")
    return len(parts) > 1 and parts[-2] in _HEADS and parts[-1] in ("weight", "bias")
