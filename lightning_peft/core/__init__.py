"""The extension API: adapters and methods, and what their authors need to place and run them.

Everything that a method outside of this package needs is exported here; other modules of the package may change.

* ``Method`` chooses hosts by ``select`` (or ``select_modules``) and yields an adapter for each.
* ``WeightUpdate`` is for adapters that train another weight: define ``delta()`` or ``updated(weight)`` and pass it the
  ``Rows`` that ``select`` returns. It is then right on every layer type, fused rows and weights that are read.
* ``Adapter`` is for all others: ``forward(host, inner, *args, **kwargs)`` surrounds the call of the host.
* ``parameter_like`` creates their parameters, ``layer_of`` says how a layer type reads, writes and applies its weight.
"""

from ..structure.layer_of import layer_of
from ..structure.layer_types import LayerType, LinearType
from ..structure.rows import Rows
from ..structure.selection import Target, select, select_modules, select_parameters
from .adapter import Adapter, InnerCall, parameter_like
from .method import Method, check_setting
from .per_row import BatchableLayerAdapter, BatchableModuleAdapter
from .weight_update import WeightUpdate

__all__ = [
    "Adapter",
    "BatchableLayerAdapter",
    "BatchableModuleAdapter",
    "InnerCall",
    "LayerType",
    "LinearType",
    "Method",
    "Rows",
    "Target",
    "WeightUpdate",
    "check_setting",
    "layer_of",
    "parameter_like",
    "select",
    "select_modules",
    "select_parameters",
]
