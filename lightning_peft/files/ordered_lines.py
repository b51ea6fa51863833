"""``LinesWriter`` streams numbered lines to a file; ``ordered_lines`` reads several such files in order."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

_SEPARATOR = b"\t"  # between a line's number and the line


class LinesWriter:
    """Appends numbered lines to a new file; nothing but the file grows.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def write(self, number: int, line: str) -> None:
        """Append a line without line breaks."""
        self._file.write(b"%d%b%b\n" % (number, _SEPARATOR, line.encode()))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def ordered_lines(paths: Sequence[Path]) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of the files of ``LinesWriter`` in the order of the numbers; of equal numbers, the first.

    Memory holds three numbers for each line, and one line at a time.
    """
    numbers, files, offsets = array("q"), array("q"), array("q")
    for index, path in enumerate(paths):
        offset = 0
        with path.open("rb") as file:
            for line in file:
                number, separator, _ = line.partition(_SEPARATOR)
                numbers.append(int(number))
                files.append(index)
                offsets.append(offset + len(number) + len(separator))
                offset += len(line)
    previous = None
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(path.open("rb")) for path in paths]
        for position in sorted(range(len(numbers)), key=numbers.__getitem__):
            if numbers[position] != previous:
                previous, file = numbers[position], opened[files[position]]
                file.seek(offsets[position])
                yield previous, file.readline().decode().rstrip("\n")
