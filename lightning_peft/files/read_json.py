"""``parse_json`` returns the object in a JSON file; whatever else it holds is one kind of error."""

from __future__ import annotations

import json
from typing import Any

MAX_JSON = 2**24  # bytes, in files of settings and headers; those of models with 100,000 layers are smaller


def parse_json(content: bytes | str, source: str) -> dict[str, Any]:
    """Return the object that JSON describes.

    Raises:
        ValueError: It is no JSON, nested too deep to be read, or no object.
    """
    if len(content) > MAX_JSON:
        raise ValueError(f"{source} has {len(content):,} bytes of JSON; at most {MAX_JSON:,} are read.")
    try:
        parsed = json.loads(content)
    except RecursionError:
        raise ValueError(f"{source} is damaged: its JSON is nested too deep. Copy or save it again.") from None
    except ValueError as error:
        raise ValueError(f"{source} is damaged ({error}). Copy or save it again.") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{source} is damaged: it holds a JSON {type(parsed).__name__}, not an object.")
    return parsed
