"""Pictures of adapted models, as SVG text."""

from __future__ import annotations

from collections import Counter
from html import escape

from torch import nn

from .hosts import adapters
from .triplets import Triplets

_WIDTH, _HEIGHT, _TOP = 42, 26, 64
_PALE, _FULL = (246, 243, 252), (106, 63, 181)


def rank_map(model: nn.Module) -> str:
    """Return an SVG of how many triplets each layer keeps: kinds of layers down, numbers of blocks across.

    Args:
        model: A model adapted by AdaLoRA.

    Raises:
        ValueError: No adapter of the model has triplets.
    """
    kept, possible = Counter[str](), Counter[str]()
    for name, _, _, adapter in adapters(model):
        if isinstance(adapter, Triplets):
            name = f"{name}.{adapter.part}".strip(".")
            kept[name] += int((adapter.kept != 0).sum())
            possible[name] += len(adapter.kept)
    if not possible:
        raise ValueError("No adapter of this model has triplets; adapt it with AdaLoRA.")
    places = {name: _place(name) for name in possible}
    kinds = list(dict.fromkeys(place[:2] for place in places.values()))
    numbers = sorted({place[2] for place in places.values()}, key=lambda text: (not text, int(text or 0)))
    often = Counter(after for _, after in kinds)
    labels = [after if often[after] == 1 else f"{before}.*.{after}" for before, after in kinds]
    left = 24 + round(7.5 * max(map(len, labels)))
    width, height = left + max(len(numbers) * _WIDTH, 240) + 16, _TOP + len(kinds) * _HEIGHT + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="13"><rect width="{width}" height="{height}" fill="white"/>',
        _text(left, 26, "start", f"kept triplets: {sum(kept.values())} of {sum(possible.values())}"),
        *(_text(left + (i + 0.5) * _WIDTH, _TOP - 8, "middle", number) for i, number in enumerate(numbers)),
        *(_text(left - 10, _TOP + i * _HEIGHT + 17, "end", label) for i, label in enumerate(labels)),
    ]
    for name, place in places.items():
        x, y = left + numbers.index(place[2]) * _WIDTH, _TOP + kinds.index(place[:2]) * _HEIGHT
        share = kept[name] / max(possible.values())
        shade = "".join(f"{round(pale + (full - pale) * share):02x}" for pale, full in zip(_PALE, _FULL, strict=True))
        box = f'<rect x="{x}" y="{y}" width="{_WIDTH - 2}" height="{_HEIGHT - 2}" fill="#{shade}">'
        parts.append(f"{box}<title>{escape(name)}: {kept[name]} of {possible[name]}</title></rect>")
        parts.append(_text(x + _WIDTH / 2 - 1, y + 17, "middle", str(kept[name]), "white" if share > 0.5 else "black"))
    return "\n".join([*parts, "</svg>\n"])


def _place(name: str) -> tuple[str, str, str]:
    """Return what stands before and after the first number in a dotted name, and the number."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if at is None:
        return "", name, ""
    return ".".join(parts[:at]), ".".join(parts[at + 1 :]) or parts[max(0, at - 1)], parts[at]


def _text(x: float, y: float, anchor: str, content: str, color: str = "black") -> str:
    return f'<text x="{x:g}" y="{y}" text-anchor="{anchor}" fill="{color}">{escape(content)}</text>'
