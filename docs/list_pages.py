"""python docs/list_pages.py: writes llms.txt, which lists the pages of the site with a sentence each (llmstxt.org).

It is a hook of MkDocs, too, which writes the same list with the addresses of the site.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "configs/index.md": "Every configuration of the repository, with its first sentence.",
    "examples/index.md": "Every example of the repository, with its first sentence.",
}
HEAD = """# lightning_peft

> Parameter-efficient fine-tuning in PyTorch Lightning: one callback, `PEFTStrategy`, trains LoRA, QLoRA, DoRA, AdaLoRA,
> (IA)³, prefix tuning, prompt tuning, bottleneck adapters and others in any LightningModule, and saves adapters alone.
"""


class Listed(NamedTuple):
    """A page of the navigation.

    Attributes:
        section: Its part of the navigation.
        title: Its first heading.
        uri: Its path among the sources of the site.
        path: Its path in the repository.
        sentence: Its first sentence.
    """

    section: str
    title: str
    uri: str
    path: str
    sentence: str


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without the functions that it names."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def pages() -> Iterator[Listed]:
    """Yield the pages of the navigation that exist."""
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)["nav"]  # noqa: S506
    for section, entries in (next(iter(part.items())) for part in nav):
        for entry in [entries] if isinstance(entries, str) else entries:
            uri = entry if isinstance(entry, str) else next(iter(entry.values()))
            if uri in FOLDERS:
                title = next(iter(entry))
                yield Listed(section, title, uri, f"{Path(uri).parent}/", FOLDERS[uri])
            elif path := next((place for place in (f"docs/{uri}", uri) if (ROOT / place).exists()), None):
                title, sentence = _title_and_sentence(path)
                yield Listed(section, title, uri, path, sentence)


def _title_and_sentence(path: str) -> tuple[str, str]:
    text = re.sub(r"<!--.*?-->|^ *(`{3,}).*?^ *\1$", "", (ROOT / path).read_text(), flags=re.M | re.S)
    title = re.search(r"^# (.+)", text, re.M)
    if title is None:
        raise ValueError(f"{path} has no heading; begin it with '# Title'.")
    paragraphs = re.split(r"\n\s*\n", text[title.end() :])
    first = next((part for part in map(str.strip, paragraphs) if part and part[0] not in "#|!*-:>"), "")
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(first.split()))
    sentence = re.match(r".*?\.(?= |$)", plain)
    return title[1], sentence[0] if sentence else plain.rstrip(":")


def listing(address: Callable[[Listed], str]) -> str:
    """Return the list, with links as a function of the page says."""
    parts, section = [HEAD], None
    for page in pages():
        if page.section != section:
            section = page.section
            parts.append(f"\n## {section}\n\n")
        says = f": {page.sentence}" if page.sentence else ""
        parts.append(f"- [{page.title}]({address(page)}){says}\n")
    return "".join(parts)


def repository_address(page: Listed) -> str:
    """Return the link to a page in the repository."""
    return page.path


def site_address(page: Listed) -> str:
    """Return the link to a page on the site."""
    folder = re.sub(r"(^|/)(index|README)\.md$", r"\1", page.uri)
    return re.sub(r"\.md$", "/", folder) or "./"


def on_post_build(config: dict[str, str]) -> None:
    """Write the list beside the pages of the site."""
    (Path(config["site_dir"]) / "llms.txt").write_text(listing(site_address))


if __name__ == "__main__":
    (ROOT / "llms.txt").write_text(listing(repository_address))
