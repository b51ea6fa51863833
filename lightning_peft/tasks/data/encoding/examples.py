"""``Examples``: the encoded rows of a split, which stay on disk until a batch asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from torch.utils.data import Dataset

if TYPE_CHECKING:
    import datasets

Example = dict[str, Any]


class Examples(Dataset[Example]):
    """Encoded rows as a sequence of mappings from name to numbers or lists of numbers.

    Args:
        rows: The data set that holds them.
    """

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return self.__getitems__(range(len(self))[index])
        example: Example = self.rows[index]
        return example

    def __getitems__(self, indices: Iterable[int]) -> list[Example]:
        """The rows at these indices, read together; DataLoader calls it."""
        columns = self.rows[list(indices)]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def lengths(self, name: str) -> list[int]:
        """The length of the list that each row has under a name; of the longest, where it has a list of lists."""
        chunks = self.rows.with_format("arrow")[:][name].chunks
        return [length for chunk in chunks for length in _longest(chunk).tolist()]

    def __iter__(self) -> Iterator[Example]:
        return iter(self.rows)


def _longest(lists: Any) -> Any:
    """Return the length of each list of an arrow array, or of the longest list in it."""
    offsets = np.asarray(lists.offsets)
    lengths = np.diff(offsets)
    if hasattr(lists.values, "offsets"):
        filled = lengths > 0
        lengths[filled] = np.maximum.reduceat(_longest(lists.values), offsets[:-1][filled])
    return lengths
