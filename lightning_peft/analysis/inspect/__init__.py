"""What adapter files hold, and in what two of them differ, without the model that they belong to."""

from .compare import compare_adapters
from .report import inspect_adapter

__all__ = ["compare_adapters", "inspect_adapter"]
