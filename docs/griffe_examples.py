"""Extension of griffe: docstrings and defaults as a reader of the reference expects them."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Reads sections named ``Example`` as ``Examples``, the name that griffe knows, and shows defaults of fields."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rename the section of one object."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Replace ``field(default_factory=lambda: value)`` by the value."""
        if isinstance(attr.value, griffe.ExprCall) and len(attr.value.arguments) == 1:
            argument = attr.value.arguments[0]
            factory = argument.value if isinstance(argument, griffe.ExprKeyword) else None
            if isinstance(factory, griffe.ExprLambda) and argument.name == "default_factory":
                attr.value = factory.body
            elif str(factory) in ("list", "dict") and argument.name == "default_factory":
                attr.value = {"list": "[]", "dict": "{}"}[str(factory)]
