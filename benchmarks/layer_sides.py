"""One adapted layer on each side: this package, HF peft and a hand-written form; and the ratios to reach."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import hand_written
import harness
import peft
import torch
from hand_written import DROPOUT, RANK
from rows import Goals
from sides import ours, peer
from torch import nn

import lightning_peft as lp

Method = Callable[[Any], lp.Method]  # of the configuration of a model; a single layer has none
Peer = Callable[[Any], peft.PeftConfig]


class SmallCase(NamedTuple):
    """A method on each side."""

    ours: Method
    peer: Peer | None
    hand: Callable[..., nn.Module] | None  # of a linear layer with its rank; of a model, if there are no targets
    targets: tuple[str, ...] = ()


# Ratios to reach: of a training step to peft and to the hand-written form, and of a decoded token to peft.
TRAIN: dict[str, Goals] = {
    "lora": {"ours/peft": 0.98, "ours/hand": 1.03},
    "lora_dropout": {"ours/peft": 0.98, "ours/hand": None},
    "dora": {"ours/peft": 0.82, "ours/hand": None},
    "ia3": {"ours/peft": 0.96, "ours/hand": None},
    "prefix_tuning": {"ours/peft": 1.01, "ours/hand": None},
}
OTHERS: Goals = {"ours/peft": 1.0, "ours/hand": None}
ADAPTERS: Goals = {"ours/adapters": 1.0}
DECODE: dict[str, float] = dict.fromkeys(TRAIN, 0.98)


def low_rank(targets: Iterable[str], rank: int = RANK) -> dict[str, SmallCase]:
    """Return the methods that update the weights of these layers, as W x + b becomes W' x + b."""
    on, at = {"targets": [*targets]}, {"target_modules": [*targets]}
    lora = on | {"rank": rank, "alpha": 2 * rank}
    peft_lora = at | {"r": rank, "lora_alpha": 2 * rank}
    adalora = at | {"init_r": rank, "target_r": rank // 2, "lora_alpha": 2 * rank, "total_step": 1000}
    lokr = at | {"decompose_factor": -1, "r": 4096, "alpha": 4096}  # a rank above every side keeps both factors whole
    by_hand = partial(partial, rank=rank)
    cases = {
        "lora": (ours("LoRA", **lora), peer("LoraConfig", **peft_lora), by_hand(hand_written.LoRA)),
        "lora_dropout": (
            ours("LoRA", **lora, dropout=DROPOUT),
            peer("LoraConfig", **peft_lora, lora_dropout=DROPOUT),
            by_hand(hand_written.LoRADropout),
        ),
        "dora": (
            ours("LoRA", **lora, decompose=True),
            peer("LoraConfig", **peft_lora, use_dora=True),
            by_hand(hand_written.DoRA),
        ),
        "adalora": (
            ours("AdaLoRA", **on, initial_rank=rank, target_rank=rank // 2),
            peer("AdaLoraConfig", **adalora),
            by_hand(hand_written.AdaLoRA),
        ),
        "fedpara": (
            ours("FedPara", **on, rank=rank),
            peer("LoHaConfig", **at, r=rank, alpha=rank),
            by_hand(hand_written.FedPara),
        ),
        "krona": (ours("KronA", **on, scale=hand_written.SCALE), peer("LoKrConfig", **lokr), hand_written.KronA),
    }
    return {name: SmallCase(*case, tuple(targets)) for name, case in cases.items()}


NO_MORE = {"train_norms": False, "train_head": False}  # of bottlenecks, so that the figures are those of the adapters
LAYER = ("layer",)
ON_LAYER = low_rank(LAYER) | {
    "ia3": SmallCase(
        ours("IA3", targets=[*LAYER], feedforward_targets=[]),
        peer("IA3Config", target_modules=[*LAYER], feedforward_modules=[]),
        hand_written.ScaledOutput,
        LAYER,
    ),
    "ia3_input": SmallCase(
        ours("IA3", targets=[], feedforward_targets=[*LAYER]),
        peer("IA3Config", target_modules=[*LAYER], feedforward_modules=[*LAYER]),
        hand_written.ScaledInput,
        LAYER,
    ),
    "bitfit": SmallCase(ours("BitFit", targets=["layer.*"]), None, hand_written.TrainedBias, LAYER),
    "bottleneck": SmallCase(
        ours("Bottleneck", targets=[*LAYER], size=RANK, **NO_MORE), None, hand_written.Bottleneck, LAYER
    ),
}


def sides_of(case: SmallCase, width: int) -> dict[str, nn.Module]:
    """Return the adapted linear layer of each side."""
    sides = {}
    torch.manual_seed(0)
    base = nn.Linear(width, width).requires_grad_(False)
    sides["ours"] = lp.inject(nn.ModuleDict({"layer": copy_of(base)}), case.ours(None))
    if case.peer is not None:
        sides["peft"] = peft.inject_adapter_in_model(case.peer(None), nn.ModuleDict({"layer": copy_of(base)}))
    sides["hand"] = {"layer": case.hand(copy_of(base))}
    return {who: filled(side["layer"]) for who, side in sides.items()}


def copy_of(layer: nn.Linear) -> nn.Linear:
    new = nn.Linear(layer.in_features, layer.out_features)
    new.load_state_dict(layer.state_dict())
    return new.requires_grad_(False)


def filled(model: nn.Module) -> nn.Module:
    """Fill what starts at zero."""
    for parameter in harness.trained(model):
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model
