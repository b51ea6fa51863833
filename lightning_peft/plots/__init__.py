"""Figures of adapters and runs, drawn with matplotlib: pip install "lightning-peft[plots]"."""

from .curves import learning_curves, validated
from .heatmaps import gate_map, rank_map
from .pareto import accuracy_over_parameters
from .save import pictures, save
from .similarity import prompt_similarity

__all__ = [
    "accuracy_over_parameters",
    "gate_map",
    "learning_curves",
    "pictures",
    "prompt_similarity",
    "rank_map",
    "save",
    "validated",
]
