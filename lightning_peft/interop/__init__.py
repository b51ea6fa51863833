"""Adapters of other libraries, in and out."""

from .exchange import export_peft, import_peft

__all__ = ["export_peft", "import_peft"]
