"""Pages of a built site: what they link to, what can be linked to, what they load."""

import posixpath
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "link": "href",
    "embed": "src",
    "object": "data",
}


class SitePage(HTMLParser):
    """One page.

    Args:
        site: Folder of the site.
        path: The file.
    """

    def __init__(self, site: Path, path: Path) -> None:
        super().__init__()
        self.site, self.path = site, path
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in LOADED and found.get(LOADED[tag]) and found.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(found[LOADED[tag]])

    def target(self, link: str) -> Path:
        """Return the file that a link of this site leads to."""
        path = unquote(urlsplit(link).path)
        whole = posixpath.normpath(posixpath.join(self.path.parent.as_posix(), path)) if path else self.path.as_posix()
        return Path(whole) / "index.html" if Path(whole).is_dir() else Path(whole)


class Site:
    """A built site.

    Args:
        folder: Where it was built.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def pages(self) -> dict[Path, SitePage]:
        """The pages but for that of missing addresses, whose links begin at the root of the host."""
        files = [path for path in sorted(self.folder.rglob("*.html")) if path.name != "404.html"]
        return {path: SitePage(self.folder, path) for path in files}

    def broken(self) -> list[str]:
        """Return links and pictures that lead nowhere on the site."""
        return [
            f"{path.relative_to(self.folder)}: {link}"
            for path, page in self.pages.items()
            for link in {*page.links, *page.loaded}
            if not is_elsewhere(link) and not self._leads(page, link)
        ]

    def _leads(self, page: SitePage, link: str) -> bool:
        target, anchor = page.target(link), unquote(urlsplit(link).fragment)
        known = not anchor or target not in self.pages or anchor in self.pages[target].ids
        return target.is_file() and known


def is_elsewhere(address: str) -> bool:
    """Return whether an address is of another host."""
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme in ("http", "https", "mailto")
