"""python examples/town_hall/derive.py: writes the files of the other tasks from the messages; see README.md.

Each split is made from the messages, or the parts, of the same split, from a fixed seed.
"""

import csv
import functools
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
DEPARTMENTS = ("housing", "noise", "parking", "parks", "records", "roads", "waste", "water")
# For each department: how many requests and how many mentions a split has, and how many messages are made of them.
SHARES = {"test": (64, 7, 32), "validation": (12, 3, 12), "train": (44, 14, 150)}
ASKS = ("Please {}.", "Could you please {}?", "Would you {}?", "I am asking you to {}.", "My request is that you {}.")
ASKS += ("Can somebody {}?", "I would be glad if you could {}.", "You really need to {}.")
ASKS += ("All I want is for you to {}.",)
LIKE = 0.5  # share of the words of two requests that both have, from which they are too near for two splits
WORDS = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]")


def likeness(first: str, second: str) -> float:
    """Return the share of the words of two texts, short ones left out, that both have."""
    one, other = words_of(first), words_of(second)
    return len(one & other) / max(1, len(one | other))


@functools.cache
def words_of(text: str) -> frozenset[str]:
    return frozenset(word.lower() for word in WORDS.findall(text) if len(word) > 3)


@functools.cache
def parts(department: str) -> dict[str, tuple[list[str], list[str]]]:
    """Return what a department is asked, and what mentions it, by split; no split has what is like that of another."""
    requests = (FOLDER / f"parts/{department}.txt").read_text(encoding="utf-8").splitlines()
    with (FOLDER / "parts/mentions.csv").open(encoding="utf-8", newline="") as file:
        mentions = [row["text"] for row in csv.DictReader(file) if row["department"] == department]
    for lines in (requests, mentions):
        random.Random(department).shuffle(lines)  # noqa: S311
    found: dict[str, tuple[list[str], list[str]]] = {}
    for split, (asked, mentioned, _) in SHARES.items():
        others = [text for part, _ in found.values() for text in part]
        own = [text for text in requests[:asked] if all(likeness(text, other) < LIKE for other in others)]
        found[split] = own, mentions[:mentioned]
        requests, mentions = requests[asked:], mentions[mentioned:]
    return found


def write_requests(split: str, draw: random.Random) -> None:
    """Write messages that ask one department for two things, and mention the business of another once or twice."""
    by_department = {name: parts(name)[split] for name in DEPARTMENTS}
    rows = []
    for name, (requests, _) in by_department.items():
        order: list[str] = []
        for _ in range(SHARES[split][2]):
            order = order if len(order) > 1 else draw.sample(requests, len(requests))  # all, before one comes again
            asks = [draw.choice(ASKS).format(order.pop()) for _ in range(2)]
            _, mentions = by_department[draw.choice([other for other in DEPARTMENTS if other != name])]
            sentences = asks + draw.sample(mentions, draw.randint(1, 2))
            rows.append([" ".join(draw.sample(sentences, len(sentences))), name])
    draw.shuffle(rows)
    with (FOLDER / f"requests_{split}.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["text", "label"], *rows])


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
        write_requests(split, random.Random(f"requests {split}"))  # noqa: S311
