"""The methods of benchmarks/evidence.py, with the settings of their files in configs/."""

import copy
from pathlib import Path
from typing import Any

import yaml

import lightning_peft as lp

CONFIGS = Path(__file__).parents[1] / "configs"
HEAD = ["pooler", "classifier"]
OF_A_CONFIG = [
    *["full_fine_tuning", "output_layers", "last_layers", "bitfit", "lora", "dora", "adalora", "fedpara", "krona"],
    *["krona_block", "ia3", "qlora", "bottleneck", "parallel_adapter", "mam", "prefix_tuning", "p_tuning_v2"],
    *["prompt_tuning", "multitask_prompt_tuning", "trainable_tokens"],
]
# Of PTuning, the configuration fills in words; in front of the text it stands beside prompt tuning, of the same length.
IN_FRONT = {"method": {"class_path": "PTuning", "init_args": {"length": 20}}, "also_train": HEAD}
ENCODER = [*OF_A_CONFIG, "krona_block_residual", "p_tuning"]


def config(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def peft_section(name: str) -> dict[str, Any]:
    """Return the section ``peft`` of a method's configuration."""
    if name == "p_tuning":
        return IN_FRONT
    section = copy.deepcopy(config(name.removesuffix("_residual"))["peft"])
    if name == "krona_block_residual":
        section["method"]["init_args"]["residual"] = True
    return section


def learning_rate(name: str) -> float:
    return float(config(name.removesuffix("_residual"))["model"]["init_args"]["learning_rate"])


def strategy(section: dict[str, Any]) -> lp.PEFTStrategy:
    """Return the callback that a section ``peft`` describes."""
    settings = dict(section)
    given = settings.pop("method")
    methods = [build(each) for each in (given if isinstance(given, list) else [given])]
    return lp.PEFTStrategy(methods, show_summary=False, **settings)


def build(written: dict[str, Any]) -> lp.Method:
    return getattr(lp, written["class_path"])(**written["init_args"])
