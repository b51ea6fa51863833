"""``targets``: what can be targeted in a model, as one table: roles, rows of fused layers, blocks, head and towers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..structure.base_model import base_modules, name_pattern
from ..structure.expert_layers import ExpertWeight, expert_modules, requested_weights
from ..structure.fused_rows import fused_rows, is_fused
from ..structure.layer_of import layer_of
from ..structure.roles import ROLES
from ..structure.structure import PART_OF_ROLE
from ..structure.structure_of import measure, structure_of
from ..structure.towers import towers

_MODULES = ("attention", "blocks", "norms")  # roles of modules, of which the class is shown and not the shape


@dataclass(frozen=True)
class TargetRow:
    """Modules of one role whose names differ in numbers alone.

    Args:
        target: The role, or ``tower``.
        count: Number of modules.
        name: Their name, with ``*`` for numbers.
        detail: For layers, inputs and outputs, and the rows of the role; else the class, or the kind of a tower.
    """

    target: str
    count: int
    name: str
    detail: str


@dataclass(frozen=True)
class TargetTable:
    """What can be targeted in a model.

    Args:
        rows: Rows of the table.
        measured: Whether a trace found the roles, and not names.
    """

    rows: tuple[TargetRow, ...]
    measured: bool

    def __str__(self) -> str:
        """Return the table as text."""
        head = ("target", "count", "name", "detail")
        cells = [head, *((row.target, str(row.count), row.name, row.detail) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        how = "measured by a trace" if self.measured else "found by names"
        text = "\n".join(line.rstrip() for line in lines)
        return f"{text}\nRoles were {how}. A glob on the end of a name is a target, too."


def targets(model: nn.Module, example_inputs: Any = None) -> TargetTable:
    """Return what can be targeted in a model.

    Args:
        model: Any module; models of transformers may be on the meta device.
        example_inputs: Inputs of the model's forward, a tensor, a tuple by position or a dictionary by name, by which
            roles are measured. Models of transformers, and those with an ``example_input_array``, need none.

    Examples:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 3)
        >>> table = lp.targets(model, example_inputs=torch.zeros(2, 5, 16))  # print it to see all of it
        >>> [(row.target, row.count, row.name) for row in table.rows][:1]
        [('attention.query', 3, 'layers.*.self_attn')]
    """
    if example_inputs is not None:
        measure(model, example_inputs)
    modules, structure = base_modules(model), structure_of(model)
    counts: dict[tuple[str, str, str], int] = {}
    for role, find in ROLES.items():
        for name in [*find(model), *(expert_modules(model) if role == "all-linear" else ())]:
            weights = requested_weights(name, modules[name], [role])
            keys = [_key_of_experts(role, name, modules[name], weight) for weight in weights]
            for key in keys or [(role, name_pattern(name), _detail(role, name, modules[name]))]:
                counts[key] = counts.get(key, 0) + 1
    rows = [TargetRow(role, count, name, detail) for (role, name, detail), count in counts.items()]
    found = [TargetRow("tower", 1, name or "the model", f"scope {kind}:...") for name, kind in towers(model).items()]
    return TargetTable((*rows, *found), structure.measured)


def _key_of_experts(role: str, name: str, module: nn.Module, weight: ExpertWeight) -> tuple[str, str, str]:
    """Return the role, the pattern of the name and the shape of a weight of experts."""
    out, width = weight.shape(module)
    return role, f"{name_pattern(name)}.{weight.part}", f"{weight.experts(module)} experts, {width} -> {out}"


def _detail(role: str, name: str, module: nn.Module) -> str:
    """Return the class of a module, or the shape of a layer with the rows that a role means."""
    if role in _MODULES:
        return type(module).__name__
    try:
        out, width, *kernel = layer_of(module).shape(module)
        shape = f"{width} -> {out}{f', kernel {tuple(kernel)}' if kernel else ''}"
        if role not in PART_OF_ROLE or not (is_fused(name, module) or isinstance(module, nn.MultiheadAttention)):
            return shape
        part = PART_OF_ROLE[role]
        rows = [str(found).removeprefix(f"{part} ") for found in fused_rows(module, name) if found.part == part]
    except (TypeError, ValueError) as error:
        return str(error)
    return f"{shape}, rows {', '.join(rows)}"
