"""The site builds without warnings and without a network; its links lead somewhere, its search finds each method."""

import json
import os
import re
import subprocess
import sys

import pytest
from installed import needs
from page_blocks import ROOT
from site_pages import Site, is_elsewhere

pytestmark = [pytest.mark.slow, needs("mkdocs", "material", "mkdocstrings")]
METHODS = {  # what people search for, by the page that they look for
    "lora": ["LoRA", "rsLoRA", "PiSSA", "OLoRA", "LoRA+", "LoRA in PyTorch Lightning"],
    "dora": ["DoRA"],
    "qlora": ["QLoRA"],
    "adalora": ["AdaLoRA"],
    "fedpara": ["FedPara", "LoHa"],
    "krona": ["KronA", "LoKr"],
    "ia3": ["IA3"],
    "t_few": ["T-Few"],
    "bitfit": ["BitFit"],
    "bottleneck": ["Houlsby"],
    "mam": ["MAM"],
    "prefix_tuning": ["prefix tuning"],
    "prompt_tuning": ["prompt tuning"],
    "p_tuning": ["P-tuning"],
    "p_tuning_v2": ["P-tuning v2"],
    "multitask_prompt_tuning": ["multitask prompt tuning"],
    "llama_adapter": ["LLaMA-Adapter"],
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-4000:]
    return Site(folder)


@pytest.fixture(scope="module")
def entries(site):
    return json.loads((site.folder / "search" / "search_index.json").read_text())["docs"]


def test_links_and_pictures_lead_somewhere(site):
    assert len(site.pages) > 100
    assert sum(len(page.links) for page in site.pages.values()) > 5000
    assert site.broken() == []


def test_nothing_is_loaded_from_another_host(site):
    loaded = {address for page in site.pages.values() for address in page.loaded}
    assert len(loaded) > 10
    assert [address for address in loaded if is_elsewhere(address)] == []
    for style in site.folder.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)\"']+", style.read_text()) == []


def test_comments_for_tests_are_not_on_the_pages(site):
    assert [
        path for path in site.pages if re.search(r"<!-- (setup|not run|over|measured|table)", path.read_text())
    ] == []


def test_configurations_and_examples_are_pages_with_their_code(site):
    for path in ("configs/lora.yaml", "examples/own_method.py"):
        text = (site.folder / path / "index.html").read_text()
        plain = re.sub(r"<[^>]+>", "", text)
        assert (ROOT / path).read_text().splitlines()[0].strip('"# ') in plain.replace("&amp;", "&")


@pytest.mark.parametrize("stem", METHODS)
def test_search_finds_the_page_of_a_method(stem, entries):
    sections = [entry for entry in entries if entry["location"].partition("#")[0] == f"methods/{stem}/"]
    (page,) = [entry for entry in sections if "#" not in entry["location"]]
    words = " ".join(re.sub(r"<[^>]+>", "", f"{entry['title']} {entry['text']}") for entry in sections).lower()
    assert METHODS[stem][0].lower() in page["title"].lower().replace("(ia)³", "ia3")
    assert [name for name in METHODS[stem] if name.lower() not in words.replace("(ia)³", "ia3")] == []


def test_the_list_of_pages_leads_to_pages(site):
    links = re.findall(r"^- \[.*?\]\(([^)]+)\): .+", (site.folder / "llms.txt").read_text(), re.M)
    assert len(links) > 40
    assert [link for link in links if not (site.folder / link / "index.html").is_file()] == []
