"""F1, precision and recall of entities, as conlleval counts them: right where both ends and the type are.

An entity is a run of tags of one type. A tag ``B-type`` or ``S-type`` begins one, and so does any tag of another type
than the one before, or one after the end of an entity (``E-type``, ``S-type``, ``O``). So IOB1, IOB2 and IOBES (also as
BILOU or BMES) are read alike. Of tags without such letters (``PER PER O``), each run of equal ones is an entity. See
https://www.clips.uantwerpen.be/conll2000/chunking/conlleval.txt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_peft.tasks.data.encoding.collator import IGNORED

_OUTSIDE = "O"
_BEGINS, _ENDS = frozenset("BSU"), frozenset("ESLU")
_TAG = re.compile(r"(?P<place>[BIESLUM])[-_](?P<type>.+)")


class EntityMetric(Metric):
    """Base class of metrics of entities; counts right, predicted and true ones of each type.

    Args:
        num_tags: Number of different tags.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    right: Tensor
    predicted: Tensor
    true: Tensor

    def __init__(self, num_tags: int) -> None:
        super().__init__()
        for name in ("right", "predicted", "true"):
            self.add_state(name, torch.zeros(num_tags, dtype=torch.long), dist_reduce_fx="sum")
        self.types: list[str] | None = None

    def read_tags(self, tags: Sequence[str]) -> None:
        """Take the names of the tags, by number.

        Raises:
            ValueError: If there are more or fewer than the metric has.
        """
        if len(tags) != len(self.right):
            raise ValueError(f"Got {len(tags)} tags for a metric of {len(self.right)}. Give all of them, in order.")
        places, types = zip(*split_tags(tags), strict=True)
        self.types = sorted({kind for kind in types if kind is not None})
        self._begins = [place in _BEGINS for place in places]
        self._ends = [place in _ENDS for place in places]
        self._type_of = [-1 if kind is None else self.types.index(kind) for kind in types]

    def update(self, predicted: Tensor, true: Tensor) -> None:
        """Count the entities of a batch.

        Args:
            predicted: Numbers of tags, (rows, tokens).
            true: The same, with -100 where a token has no tag.
        """
        if self.types is None:
            raise RuntimeError("The names of the tags, which tell entities, are not known. Call read_tags first.")
        found, real = (self._entities(tags, true != IGNORED) for tags in (predicted, true))
        both = found[torch.isin(found, real)]
        for name, entities in {"right": both, "predicted": found, "true": real}.items():
            kinds = entities % len(self.right)
            setattr(self, name, getattr(self, name) + torch.bincount(kinds, minlength=len(self.right)))

    def _entities(self, tags: Tensor, is_tagged: Tensor) -> Tensor:
        """Return a number for each entity, which its two ends and its type decide; (entities,)."""
        tags = torch.where(is_tagged, tags, 0)
        begins, ends, kinds = (
            torch.tensor(x, device=tags.device)[tags] for x in (self._begins, self._ends, self._type_of)
        )
        gap = kinds.new_full((len(tags), 1), -1)  # after each row
        keep = torch.cat([is_tagged, gap.bool()], 1)
        kinds, begins, ends = (torch.cat([x, gap.to(x.dtype)], 1)[keep] for x in (kinds, begins, ends))
        before, after_end = kinds.roll(1), ends.roll(1)
        starts = (kinds >= 0) & (begins | after_end | (before != kinds))
        lasts = (kinds >= 0) & (starts | (kinds < 0)).roll(-1)
        first, last = starts.nonzero()[:, 0], lasts.nonzero()[:, 0]
        return (first * len(kinds) + last) * len(self.right) + kinds[first]

    def by_type(self) -> dict[str, float]:
        """The value of each type of entity, over all processes."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            values = self._value(self.right, self.predicted, self.true)
        return {kind: float(values[number]) for number, kind in enumerate(self.types or ())}

    def compute(self) -> Tensor:
        """The value over entities of all types; 0 where it is undefined."""
        return self._value(self.right.sum(), self.predicted.sum(), self.true.sum())

    @staticmethod
    def _value(right: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        raise NotImplementedError


class EntityPrecision(EntityMetric):
    """Share of the predicted entities that are right."""

    @staticmethod
    def _value(right: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        return right / predicted.clamp(min=1)


class EntityRecall(EntityMetric):
    """Share of the true entities that are found."""

    @staticmethod
    def _value(right: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        return right / true.clamp(min=1)


class EntityF1(EntityMetric):
    """2 right / (predicted + true), the harmonic mean of precision and recall."""

    @staticmethod
    def _value(right: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
        return 2 * right / (predicted + true).clamp(min=1)


def split_tags(tags: Sequence[str]) -> list[tuple[str, str | None]]:
    """Each tag as its place in an entity (``B``, ``I``, ``E``, ``S`` or as BILOU and BMES write them) and its type.

    The type is None outside of entities. A tag without such a letter is a type by itself, and its place ``I``; if all
    tags are such letters, they have no types.

    Args:
        tags: All tags there are.
    """
    letters = {"B", "I", "E", "S", "L", "U", "M", _OUTSIDE}
    if set(tags) <= letters:
        return [(tag, None if tag == _OUTSIDE else "") for tag in tags]
    matches: list[Any] = [_TAG.fullmatch(tag) for tag in tags]
    split = [(match["place"], match["type"]) if match else ("I", tag) for tag, match in zip(tags, matches, strict=True)]
    return [(_OUTSIDE, None) if tag == _OUTSIDE else pair for tag, pair in zip(tags, split, strict=True)]
