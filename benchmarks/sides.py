"""A method beside the same method of HF peft and beside the floor: saved bytes, training step, eval forward."""

import itertools
from argparse import Namespace
from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import harness
import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from rows import found, timed
from torch import Tensor, nn

import lightning_peft as lp

Loss = Callable[[nn.Module, harness.Batch], Tensor]


def of(config: Any, setting: Any) -> Any:
    """Return a setting for one model: a mapping chooses by its type, a function is called with its configuration."""
    if isinstance(setting, Mapping):
        setting = setting[config.model_type]
    return setting(config) if callable(setting) else setting


def ours(name: str, **settings: Any) -> Callable[[Any], lp.Method]:
    return lambda config: getattr(lp, name)(**{key: of(config, value) for key, value in settings.items()})


def peer(name: str, **settings: Any) -> Callable[[Any], peft.PeftConfig]:
    return lambda config: getattr(peft, name)(**{key: of(config, value) for key, value in settings.items()})


def pattern(targets: Mapping[str, list[str]]) -> dict[str, str]:
    """Return globs as the regular expressions that peft takes, by kind of model."""
    globs = {kind: "|".join(names).replace(".", r"\.").replace("*", ".*") for kind, names in targets.items()}
    return {kind: rf".*\.({names})" for kind, names in globs.items()}


class Case(NamedTuple):
    """A method on both sides, with the ratios to reach: a training step's to the floor and to peft, saved bytes'."""

    ours: Callable[[Any], lp.Method]  # of a model's configuration, as the peer is
    peer: Callable[[Any], peft.PeftConfig] | None = None
    floor_goal: float | None = None
    peft_goal: float | None = None
    bytes_goal: float = 1.0
    eval_goal: float | None = 1.03  # to the floor; a method that does not merge has none
    parts: tuple[str, ...] = ("bytes", "train", "eval")
    loss: Loss = harness.loss
    calls: Mapping[str, Loss] = {}  # by side, where one is called in another way
    added: int = 0  # virtual tokens of each row; the goal to the floor grows with the rows
    peer_on: tuple[str, ...] = tuple(harness.MODELS)
    surplus: Any = 0  # how many numbers ours trains beyond peft's, by design; None: the designs share no count


def both(kind: str, case: Case, small: bool) -> tuple[lp.Method, dict[str, nn.Module], dict[str, int]]:
    """Return our method, and both sides' models and trained counts."""
    build = partial(harness.MODELS[kind], small)
    model = build()[0]
    method = case.ours(model.config)
    models = {"ours": lp.inject(model, method)}
    if case.peer is not None and kind in case.peer_on:
        models["peft"] = wrapped(build()[0], case.peer(model.config))
    for parameter in itertools.chain(*map(harness.trained, models.values())):
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    counts = {who: sum(p.numel() for p in harness.trained(model)) for who, model in models.items()}
    if "peft" in models:
        layers = sum(isinstance(module, BaseTunerLayer) for module in models["peft"].modules())
        assert layers in (0, len({name for name, *_ in lp.adapters(model)}))  # 0: peft does not work by layers here
        surplus = of(model.config, case.surplus)
        assert surplus is None or counts["ours"] - counts["peft"] == surplus, counts
    return method, models, counts


def wrapped(model: nn.Module, config: peft.PeftConfig) -> peft.PeftModel:
    """Return a peft model whose task head is frozen: peft trains it with every classifier's prompts."""
    result = peft.get_peft_model(model, config)
    for module in result.modules():
        if isinstance(module, peft.utils.ModulesToSaveWrapper):
            module.requires_grad_(False)
    return result


def called(model: nn.Module) -> nn.Module:
    """Return what does a peft model's work: the model inside, but all of it where it adds tokens or keys itself."""
    if not isinstance(model, peft.PeftModel) or model.active_peft_config.is_prompt_learning:
        return model
    return model.base_model.model


def compare(kind: str, case: Case, options: Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Saved bytes, training step and eval forward of one method, by part."""
    parts = [part for part in case.parts if part in options.only]
    if not parts:
        return
    pair = both(kind, case, options.small)
    base, batch = harness.MODELS[kind](options.small)
    models = {"floor": harness.floor(base)} | {who: called(model) for who, model in pair[1].items()}
    losses = {who: case.calls.get(who, case.loss) for who in models}
    for part in parts:
        if part == "bytes":
            sizes = {who: harness.saved_bytes(losses[who], model.train(), batch) for who, model in models.items()}
            row = divided(sizes, case.bytes_goal, trained=pair[2])
        elif part == "train":
            goals = {"ours/floor": grown(case, batch), "ours/peft": case.peft_goal, "peft/floor": None}
            steps = {who: harness.train_step(losses[who], model, batch) for who, model in models.items()}
            row = timed(known(goals, models), options, steps)
            assert all(p.grad is not None for model in models.values() for p in harness.trained(model))
        else:
            goals = {"ours/floor": case.eval_goal, "ours/peft": 1.00, "peft/floor": None}
            forwards = {who: torch.no_grad()(partial(losses[who], m.eval(), batch)) for who, m in models.items()}
            row = timed(known(goals, models), options, forwards)
        yield part, row


def divided(sizes: dict[str, int], goal: float, **more: Any) -> dict[str, Any]:
    """Return our saved bytes over the others'."""
    values = {f"ours/{who}": sizes["ours"] / sizes[who] for who in sizes if who != "ours"}
    return found(values, known({"ours/peft": goal}, sizes), bytes=sizes, **more)


def known(goals: dict[str, float | None], sides: Container[str]) -> dict[str, float | None]:
    """Return the goals of pairs of which both sides are there."""
    return {pair: goal for pair, goal in goals.items() if all(who in sides for who in pair.split("/"))}


def grown(case: Case, batch: harness.Batch) -> float | None:
    """Return the goal to the floor for rows that virtual tokens make longer."""
    tokens = batch["input_ids"].shape[1]
    return case.floor_goal and round(case.floor_goal * (tokens + case.added) / tokens, 4)
