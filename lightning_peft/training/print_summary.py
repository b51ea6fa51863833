"""``print_summary``: the summary of what trains, as a table."""

from __future__ import annotations

from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning_utilities.core.imports import RequirementCache
from torch import nn

from ..summary import summary


@rank_zero_only
def print_summary(module: nn.Module) -> None:
    """Print what trains: as a rich table where rich is installed, as Lightning does, else as text."""
    counts = summary(module)
    if not RequirementCache("rich"):
        rank_zero_info(f"\n{counts}")
        return
    from rich.console import Console
    from rich.table import Table

    table, console = Table("trains"), Console()
    for heading in ("places", "parameters"):
        table.add_column(heading, justify="right")
    for name, places, parameters in counts.rows:
        table.add_row(name, f"{places:,}", f"{parameters:,}")
    console.print(table)
    console.print(counts.caption)
