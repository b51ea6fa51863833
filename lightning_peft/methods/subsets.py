"""``FullFineTuning``, ``OutputLayers`` and ``LastLayers``: methods that train base parameters and add no adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable
from dataclasses import dataclass

from torch import nn

from ..core.method import Method, check_setting
from ..structure.base_model import base_parameters, outwards
from ..structure.roles import output_layers
from ..structure.selection import select_parameters
from ..structure.structure_of import structure_of


@dataclass(frozen=True, kw_only=True)
class FullFineTuning(Method):
    """Trains every parameter of the base model, as a reference for the other methods.

    Examples:
        >>> summary = lp.summary(lp.inject(nn.Sequential(nn.Linear(16, 2)), lp.FullFineTuning()))
        >>> summary.trainable, summary.total
        (34, 34)
    """

    name: str = "full"

    def parameters(self, model: nn.Module) -> Iterable[str]:
        return [name for name, parameter in base_parameters(model).items() if parameter.is_floating_point()]


@dataclass(frozen=True, kw_only=True)
class OutputLayers(Method):
    """Trains existing output layers: the weighted layers that follow the last block.

    Args:
        name: Name of the method.
        targets: Globs of modules or parameters, or roles. The role ``output`` refuses a layer that shares its weight
            with the input embeddings, which would change too; name such a layer explicitly to train both.

    Examples:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> lp.summary(lp.inject(model, lp.OutputLayers(targets=["2"]))).trainable
        18
    """

    name: str = "output_layers"
    targets: list[str] = dataclasses.field(default_factory=lambda: ["output"])

    def parameters(self, model: nn.Module) -> Iterable[str]:
        chosen = select_parameters(model, self.targets, roles_only=self.targets == ["output"])
        if "output" in self.targets:
            prefixes = tuple(f"{name}." for name in output_layers(model))
            tied = [n for n in select_parameters(model, ["output"], roles_only=True) if not n.startswith(prefixes)]
            check_setting(
                not tied,
                "output layer",
                f"tied to {tied[0]}" if tied else "",
                f"untied, or named in targets: {output_layers(model)}",
            )
        return chosen


@dataclass(frozen=True, kw_only=True)
class LastLayers(Method):
    """Trains the last ``count`` blocks and everything that follows them.

    Args:
        name: Name of the method.
        count: Number of blocks, counted from the output.

    Examples:
        >>> x = torch.randn(2, 5, 16)
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 3)
        >>> _ = lp.inject(model, lp.LastLayers(count=1), example_inputs=x)
        >>> {name[:8] for name, parameter in model.named_parameters() if parameter.requires_grad}
        {'layers.2'}
    """

    name: str = "last_layers"
    count: int = 1

    def __post_init__(self) -> None:
        check_setting(isinstance(self.count, int) and self.count > 0, "count", self.count, "a positive whole number")

    def parameters(self, model: nn.Module) -> Iterable[str]:
        structure = structure_of(model)
        called = list(structure.names["called"])
        names = sorted(structure.names["blocks"], key=called.index)
        check_setting(
            self.count <= len(names), "count", self.count, f"at most {len(names)}, the number of blocks found"
        )
        following = set(called[called.index(names[-self.count]) :])
        before, unused = set(called) - following, set(structure.names.get("unused", ()))
        return [n for n in base_parameters(model) if n not in unused and _follows(n, following, before)]


def _follows(parameter: str, following: Container[str], before: Container[str]) -> bool:
    """Return whether the innermost module that is called and holds a parameter follows."""
    holders = outwards(parameter.rpartition(".")[0])
    return next((module in following for module in holders if module in following or module in before), False)
