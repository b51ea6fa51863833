"""Reports on adapter files, and on the differences of two of them, without the model that they belong to."""

from .compare import compare_adapters
from .report import inspect_adapter

__all__ = ["compare_adapters", "inspect_adapter"]
