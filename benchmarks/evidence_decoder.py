"""One run of benchmarks/evidence.py on E2E: a small decoder, a method."""

from typing import Any

METHODS: list[str] = []
RATES: dict[str, float] = {}


def run(method: str, name: str, seed: int, rates: list[float], settings: dict[str, Any]) -> dict[str, Any]:
    raise NotImplementedError
