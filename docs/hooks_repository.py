"""MkDocs hook: files of the repository outside of ``docs`` are on the site where pages link to them.

Pages link to files as GitHub needs it, ``[lora.yaml](../configs/lora.yaml)``. Markdown becomes a page, source code and
configurations become pages with their code, a folder becomes a page that lists it, and other files are copied.
"""

import ast
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".cff": "yaml", "": "bash"}
FOUND_BY_SEARCH = ("configs/", "examples/")  # of code; that of the package would bury the pages
# Who looks for a name looks for the page on it, less for its arguments, and least for a file that has it.
BOOSTS = {
    "docs/methods/": 4, "docs/how_to/": 2, "docs/api/": 0.7, "docs/": 1, "configs/recipes/": 1, "configs/trainer/": 1,
    "configs/": 0.3, "examples/": 0.3, "CHANGELOG": 0.2, "CONTRIBUTING": 0.5,
}  # fmt: skip
LINK = re.compile(r"(?P<start>\]\()(?P<target>[^()\s#]+)(?P<anchor>#[^()\s]*)?(?P<end>(?:\s+\"[^\"]*\")?\))")
FENCE = re.compile(r"^ *(`{3,}).*?^ *\1 *$|<!--.*?-->", re.M | re.S)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages link to, and pages that the navigation names."""
    queue = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    queue += [repository_path(uri) for uri in _nav_paths(config.nav)]
    seen = set(queue)
    while queue:
        path = queue.pop()
        if not _has_its_place(path) and (ROOT / path).exists() and site_path(path) not in files.src_uris:
            files.append(_publish(path, config))
        for target in targets(path):
            if target not in seen:
                seen.add(target)
                queue.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files of the repository to where they are on the site; rank pages in the search."""
    source = repository_path(page.file.src_uri)
    boost = next((boost for start, boost in BOOSTS.items() if source.startswith(start)), 1)
    page.meta.setdefault("search", {"boost": boost})
    end, parts = 0, []
    for fence in FENCE.finditer(markdown):
        parts += [rewrite(markdown[end : fence.start()], source, page.file.src_uri), fence[0]]
        end = fence.end()
    return "".join([*parts, rewrite(markdown[end:], source, page.file.src_uri)])


def rewrite(text: str, source: str, uri: str) -> str:
    """Return text of a page, given by its paths in the repository and on the site, with links of the site."""

    def link(match: re.Match[str]) -> str:
        target = resolve(source, match["target"])
        if target is None:
            return match[0]
        site = site_path(target)
        anchor = match["anchor"] if target.endswith(".md") and target != "README.md" else None
        return f"{match['start']}{posixpath.relpath(site, posixpath.dirname(uri) or '.')}{anchor or ''}{match['end']}"

    return LINK.sub(link, text)


def resolve(source: str, target: str) -> str | None:
    """Return the path in the repository of what a page links to, or None where there is no such file."""
    if ":" in target or target.startswith("/"):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path.startswith("..") or not (ROOT / path).exists():
        return None
    return f"{path}/README.md" if (ROOT / path / "README.md").exists() else path


def targets(path: str) -> Iterator[str]:
    """Yield paths in the repository that a page of Markdown links to; a folder links to its files."""
    if (ROOT / path).is_dir():
        yield from (f"{path}/{child.name}" for child in _children(path))
    elif path.endswith(".md") and (ROOT / path).exists():
        for match in LINK.finditer(FENCE.sub("", (ROOT / path).read_text())):
            target = resolve(path, match["target"])
            if target is not None and not _has_its_place(target):
                yield target


def _has_its_place(path: str) -> bool:
    """Whether MkDocs publishes a file itself."""
    return path.startswith("docs/") and not path.endswith(".py")


def site_path(path: str) -> str:
    """Return where a file of the repository is among the sources of the site."""
    if path == "README.md":
        return "index.md"  # the site's own first page
    if _has_its_place(path):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"{path}/index.md"
    return f"{path}.md" if Path(path).suffix in LANGUAGES else path


def repository_path(uri: str) -> str:
    """Return the path in the repository of a source of the site."""
    if (ROOT / "docs" / uri).exists():
        return f"docs/{uri}"
    places = (uri, uri.removesuffix("/index.md"), uri.removesuffix(".md"))
    return next((path for path in places if (ROOT / path).exists()), f"docs/{uri}")


def _publish(path: str, config: MkDocsConfig) -> File:
    level, uri = InclusionLevel.NOT_IN_NAV, site_path(path)
    if (ROOT / path).is_dir():
        return File.generated(config, uri, content=_listing(path), inclusion=level)
    if uri == path:
        return File.generated(config, uri, abs_src_path=str(ROOT / path), inclusion=level)
    return File.generated(config, uri, content=_code_page(path), inclusion=level)


def _code_page(path: str) -> str:
    text, language = (ROOT / path).read_text(), LANGUAGES[Path(path).suffix]
    head = "" if path.startswith(FOUND_BY_SEARCH) else "---\nsearch:\n  exclude: true\n---\n\n"
    return f"{head}# {path}\n\n``````{language}\n{text.rstrip()}\n``````\n"


def _listing(path: str) -> str:
    rows = [
        f"* [{child.name}]({site_path(f'{path}/{child.name}')[len(path) + 1 :]}){_says(child)}"
        for child in _children(path)
    ]
    return "\n".join([f"# {path}", "", *rows, ""])


def _children(path: str) -> list[Path]:
    files = (ROOT / path).iterdir()
    return sorted(child for child in files if child.is_file() and child.suffix in LANGUAGES and child.suffix)


def _says(path: Path) -> str:
    """Return the first sentence of a file of Python, or the second line of comments of a configuration."""
    if path.suffix == ".py":
        text = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
    else:
        comments = [line[2:] for line in path.read_text().splitlines()[:3] if line.startswith("# ")]
        text = next((line for line in comments if not line.startswith("lightning-peft")), "")
    return f": {text}" if text else ""


def _nav_paths(nav: object) -> Iterator[str]:
    """Yield the paths in a navigation, which nests lists and mappings."""
    if isinstance(nav, str):
        yield nav
    for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _nav_paths(part)
