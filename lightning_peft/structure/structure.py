"""``Structure``: which modules of a model play which role, and what else the selection of targets needs to know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .rows import Rows

PART_OF_ROLE = {"attention.query": "query", "attention.key": "key", "attention.value": "value"}
LAYER_ROLES = (*PART_OF_ROLE, "attention.output", "feedforward.up", "feedforward.down")


@dataclass(frozen=True)
class Structure:
    """Names of a model's modules by what they do.

    ``names`` has these keys:

    * those of ``LAYER_ROLES``: layers;
    * ``attention``: modules that hold key projections and call attention;
    * ``blocks``: repeated blocks;
    * ``output``: layers with weights that follow the last block;
    * ``called``: all modules, in the order of their calls where that was measured;
    * only where it was measured, ``read``: modules whose weight is read outside of their calls; ``unused``: parameters
      on which no output depends; ``zero_inputs``: layers whose inputs are zero in each call.

    Args:
        names: Names by key, in the model's order.
        linear_branches: In gated feed-forward networks, the up-projection without activation by the down-projection.
        rows: For each linear layer that was traced, its rows of query, key and value if it computes several of them, or
            more; a text says why they cannot be told; None if it does not.
        heads: Number of query heads by attention module, where it was measured.
        measured: Whether a trace shows all this, and not the names of modules.
    """

    names: Mapping[str, Sequence[str]]
    linear_branches: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[str, list[Rows] | str | None] = field(default_factory=dict)
    heads: Mapping[str, int | None] = field(default_factory=dict)
    measured: bool = False

    def below(self, name: str) -> Structure:
        """Return the same with names as they are in a model that has this one as the module ``name``."""
        if not name:
            return self
        return Structure(
            {key: [f"{name}.{n}" for n in names] for key, names in self.names.items()},
            {f"{name}.{down}": f"{name}.{up}" for down, up in self.linear_branches.items()},
            {f"{name}.{layer}": rows for layer, rows in self.rows.items()},
            {f"{name}.{module}": heads for module, heads in self.heads.items()},
            self.measured,
        )

    def with_parts(self, parts: Mapping[str, Structure], order: Iterable[str]) -> Structure:
        """Return the structure of a model whose parts are known better.

        Args:
            parts: Structures of modules by name, with names as they are in the model.
            order: Names of the model's modules in its order.
        """
        inside, position = tuple(f"{name}." for name in parts), {name: i for i, name in enumerate(order)}
        keys = dict.fromkeys(key for structure in (self, *parts.values()) for key in structure.names)
        names = {}
        for key in keys:
            known = {name for name in self.names.get(key, ()) if not name.startswith(inside)}
            known.update(*(part.names.get(key, ()) for part in parts.values()))
            names[key] = sorted(known, key=lambda name: position.get(name, len(position)))
        branches = {down: up for down, up in self.linear_branches.items() if not down.startswith(inside)}
        for part in parts.values():
            branches |= part.linear_branches
        rows = {layer: rows for part in parts.values() for layer, rows in part.rows.items()}
        heads = {module: count for part in parts.values() for module, count in part.heads.items()}
        return Structure(names, branches, rows, heads, all(part.measured for part in parts.values()))
