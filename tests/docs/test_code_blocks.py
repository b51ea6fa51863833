"""Every block of code of every page runs, or says why not."""

import re
from collections import Counter

import pytest
from installed import needs
from page_blocks import PAGES, ROOT, RUN, SHOWN, blocks_of, outside, parse
from run_blocks import PageRun, commands_of, parse_command

QUICK = ("docs/architecture.md", "docs/data.md", "docs/serving.md")  # whose blocks take no second


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in a folder from which configurations and examples are where a reader has them."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)


@needs("transformers")
@pytest.mark.parametrize(
    "page", [page if page in QUICK else pytest.param(page, marks=pytest.mark.slow) for page in PAGES]
)
@pytest.mark.filterwarnings("default")  # what other libraries warn of is no fault of a page
@pytest.mark.usefixtures("folder")
def test_each_block_of_a_page_runs(page):
    to_run = [block for block in blocks_of(page) if block.language in RUN and block.not_run is None]
    session = PageRun(page)
    ran = 0
    try:
        for block in to_run:
            session.run(block)
            ran += 1
    finally:
        session.close()
    assert ran == len(to_run)


@pytest.mark.parametrize("page", PAGES)
def test_each_block_has_a_language_that_tests_know(page):
    unknown = [
        f"{page}:{block.line}: {block.language!r}" for block in blocks_of(page) if block.language not in RUN + SHOWN
    ]
    assert unknown == []


@pytest.mark.parametrize("page", PAGES)
def test_no_code_stands_outside_of_fences(page):
    assert re.findall(r"^ {4,}(?:\$ |lightning-peft |python |pip |make |import |from ).*", outside(page), re.M) == []


def test_blocks_are_counted(capsys):
    blocks = [block for page in PAGES for block in blocks_of(page)]
    left_out = [block for block in blocks if block.not_run is not None]
    ran = Counter(block.language for block in blocks if block.language in RUN and block.not_run is None)
    commands = sum(
        len(commands_of(block.text)) for block in blocks if block.language == "bash" and block.not_run is None
    )
    with capsys.disabled():
        print(
            f"\n{len(PAGES)} pages, blocks that run: {dict(ran)}, {commands} commands in them; not run: {len(left_out)}"
        )
        print(*(f"  {block.page}:{block.line} {block.language}: {block.not_run}" for block in left_out), sep="\n")
    fences = sum(len(re.findall(r"^ *```\w", (ROOT / page).read_text(), re.M)) for page in PAGES)
    assert (
        sum(ran.values())
        - ran["setup"]
        + len(left_out)
        + sum(block.language in SHOWN and block.not_run is None for block in blocks)
        == fences
    )
    assert [block for block in left_out if len(block.not_run.split()) < 3] == []
    assert min(ran["python"], ran["bash"], commands) > 10


def test_parts_of_a_page_are_read():
    text = """
<!-- setup
x = 1
-->
```python
x += 1
```
1. item

   <!-- not run: needs a cluster of machines -->
   ```bash
   lightning-peft fit
   ```
<!-- over: configs/chat.yaml -->

```yaml title="mine"
a: 1
```
"""
    found = [(block.line, block.language, block.text, block.over, block.not_run) for block in parse("page", text)]
    assert found == [
        (2, "setup", "x = 1\n", None, None),
        (5, "python", "x += 1\n", None, None),
        (11, "bash", "lightning-peft fit\n", None, "needs a cluster of machines"),
        (16, "yaml", "a: 1\n", "configs/chat.yaml", None),
    ]


@pytest.mark.parametrize("text", ["<!-- over: a.yaml -->\nwords\n```yaml\n```\n", "<!-- not run: no reason -->\n"])
def test_a_comment_without_its_block_is_refused(text):
    with pytest.raises(ValueError, match="no block follows"):
        list(parse("page", text))


@pytest.mark.slow
@needs("transformers")
@pytest.mark.usefixtures("folder")
def test_wrong_commands_are_refused():
    parse_command(["fit", "--config", "configs/lora.yaml", "--peft.method.rank", "4"])
    for wrong in (["--peft.method.ranks", "4"], ["--config", "configs/none.yaml"], ["--peft.method", "LoRAA"]):
        with pytest.raises(AssertionError, match="refused"):
            parse_command(["fit", "--config", "configs/lora.yaml", *wrong])
