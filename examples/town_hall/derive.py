"""python examples/town_hall/derive.py: writes the files of the other tasks from the messages; see README.md.

Each split is made from the messages of the same split, from a fixed seed.
"""

import csv
import json
import random
import re
from pathlib import Path

FOLDER = Path(__file__).parent
ROWS = {"train": 160, "validation": 32, "test": 64}
KINDS = "Approach|Avenue|Bank|Beck|Bridge|Brook|Close|Corner|Court|Cross|Drive|End|Green|Hill|House|Lane|Park|Rise|Road"
KINDS += "|Row|Square|Street|Terrace|Top|Towers|Walk|Way|Yard"
NAME = r"(?!(?:A|An|And|As|At|By|Can|From|How|If|In|Is|My|On|Our|Please|The|To|When|Why|Your)\b)[A-Z][a-z]+(?:'s|s')?"
PLACES = re.compile(rf"\b(?:{NAME} )+(?:{KINDS})\b|\b(?:Castlemead|Pottlegate|Quillgate|Shalebury|Wickerby)\b")
MONTHS = "January|February|March|April|June|July|August|September|October|November|December"
DATES = re.compile(
    r"\b(?:Whit |Good |last |next |this )?(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)days?\b"
    rf"|\b(?:{MONTHS}|Easter|Christmas)\b"
    r"|\b(?:in|last|next|since|of|by|from|until) (?:May|Whitsun)\b"
)
WORDS = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]")


def messages(split: str) -> list[dict[str, str]]:
    with (FOLDER / f"{split}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def letter(rows: list[dict[str, str]], count: int, draw: random.Random) -> tuple[str, list[str]]:
    """Join some messages; return the text, and the departments that it is for."""
    chosen = draw.sample(rows, count)
    return " ".join(row["text"] for row in chosen), sorted({row["label"] for row in chosen})


def write_letters(split: str, draw: random.Random) -> None:
    """Write letters with one to three matters: several labels a row."""
    with (FOLDER / f"letters_{split}.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(ROWS[split]):
            text, departments = letter(messages(split), draw.randint(1, 3), draw)
            file.write(json.dumps({"text": text, "departments": departments}, ensure_ascii=False) + "\n")


def write_pairs(split: str, draw: random.Random) -> None:
    """Write pairs of letters, scored by the share of departments that they have in common, of those of either."""
    rows = messages(split)
    with (FOLDER / f"pairs_{split}.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["first", "second", "score"])
        for _ in range(ROWS[split]):
            wanted = set(draw.sample(sorted({row["label"] for row in rows}), draw.randint(2, 4)))
            few = [row for row in rows if row["label"] in wanted]
            (first, one), (second, other) = (letter(few, draw.randint(1, 2), draw) for _ in range(2))
            table.writerow([first, second, f"{len({*one} & {*other}) / len({*one} | {*other}):.2f}"])


def write_names(split: str) -> None:
    """Write the words of messages that name a place or a day, tagged in IOB2."""
    with (FOLDER / f"names_{split}.conll").open("w", encoding="utf-8") as file:
        for row in messages(split):
            spans = [("place", match.span()) for match in PLACES.finditer(row["text"])]
            taken = [position for _, (first, last) in spans for position in range(first, last)]
            days = [("day", match.span()) for match in DATES.finditer(row["text"]) if match.start() not in taken]
            if spans or days:
                words = [f"{word.group()}\t{tag(word.start(), spans + days)}\n" for word in WORDS.finditer(row["text"])]
                file.write("".join(words) + "\n")


def tag(start: int, spans: list[tuple[str, tuple[int, int]]]) -> str:
    inside = [(kind, first) for kind, (first, last) in spans if first <= start < last]
    return f"{'B' if inside[0][1] == start else 'I'}-{inside[0][0]}" if inside else "O"


if __name__ == "__main__":
    for split in ROWS:
        write_letters(split, random.Random(f"letters {split}"))  # noqa: S311
        write_pairs(split, random.Random(f"pairs {split}"))  # noqa: S311
        write_names(split)
