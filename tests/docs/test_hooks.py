"""Hooks of the site: lists, comments and links of GitHub's Markdown."""

import pytest
from installed import needs

pytestmark = needs("mkdocs")


@pytest.mark.parametrize(
    ("github", "site"),
    [
        ("Words:\n- one\n  goes on\n- two\n", "Words:\n\n- one\n    goes on\n- two\n"),
        ("* one\n  * two\n\n    text\n* three\n", "* one\n    * two\n\n        text\n* three\n"),
        ("1. one\n   ```bash\n   a\n     b\n   ```\n", "1. one\n    ```bash\n    a\n      b\n    ```\n"),
        ("* one\n\nno item\n", "* one\n\nno item\n"),
        ("```text\n* a\n  * b\n```\n", "```text\n* a\n  * b\n```\n"),
        ("| a | `x \\| y` |\n", "| a | `x | y` |\n"),
        ("* one\nlazy\n", "* one\n    lazy\n"),
    ],
)
def test_lists_are_nested_as_the_site_needs_it(github, site):
    from docs.hooks_markdown import nest_lists

    assert nest_lists(github) == site


def test_comments_are_left_out_but_not_of_code():
    from docs.hooks_markdown import without_comments

    text = "a\n<!-- setup\nx = 1\n-->\n```html\n<!-- over: here -->\n```\n<!-- not run: no GPU -->\nb\n"
    assert without_comments(text) == "a\n```html\n<!-- over: here -->\n```\nb\n"


def test_links_to_files_lead_to_their_pages():
    from docs.hooks_repository import rewrite

    text = "[a](../../configs/lora.yaml) [b](../chat.md#rows) [c](../../README.md#x) [d](https://x.org) [e](none.md)"
    assert rewrite(text, "docs/methods/lora.md", "methods/lora.md") == (
        "[a](../configs/lora.yaml.md) [b](../chat.md#rows) [c](../index.md) [d](https://x.org) [e](none.md)"
    )


def test_pages_outside_of_docs_link_to_pages_of_docs():
    from docs.hooks_repository import rewrite

    text = "[a](docs/chat.md#rows) ![p](docs/rooms.svg) [c](lightning_peft/methods/lora.py)"
    assert rewrite(text, "CONTRIBUTING.md", "CONTRIBUTING.md") == (
        "[a](chat.md#rows) ![p](rooms.svg) [c](lightning_peft/methods/lora.py.md)"
    )


def test_sources_of_the_site_and_files_of_the_repository_are_matched():
    from docs.hooks_repository import repository_path, site_path

    paths = ["docs/chat.md", "configs/lora.yaml", "configs", "CONTRIBUTING.md", "benchmarks/results/ladder.json"]
    found = [site_path(path) for path in paths]
    assert found == ["chat.md", "configs/lora.yaml.md", "configs/index.md", "CONTRIBUTING.md", paths[-1]]
    assert [repository_path(uri) for uri in found] == paths
