"""docs/architecture.md and CONTRIBUTING.md name what is there, and tell of what runs in the order in which it runs."""

import re
import sys
import textwrap
from xml.sax.saxutils import escape

import lightning.pytorch as pl
import pytest
import torch
from documents import PACKAGE, ROOT, blocks, defines, execute, links, locate, prose, references
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from trainer_models import trainer

import lightning_peft as lp
from docs.draw_rooms import FILES, ORDER, PICTURE, arrows, draw, says

PAGE = "docs/architecture.md"
PAGES = {PAGE: 90, "CONTRIBUTING.md": 40}  # and how many names they hold at least
TO_COME = {"configs/rank_one.yaml", "utils.py"}  # what the pages' reader will write, or must not


def test_the_picture_is_what_the_script_draws_from_the_imports():
    assert PICTURE.read_text() == draw(), "run python docs/draw_rooms.py"


def test_the_picture_has_each_room_with_its_sentence_and_a_dot_for_each_arrow():
    found = arrows()
    assert list(found) == [name for name in ORDER if name != "__main__"]
    assert found["ops"] == []
    assert found["core"] == ["ops", "files", "structure"]
    picture = draw()
    assert picture.count("<circle") == sum(map(len, found.values()))
    assert picture.count('class="room"') == len(found)
    words = [says(FILES[f"lightning_peft.{name}"]).split()[-1] for name in found]
    assert [word for word in words if f"{escape(word)}</text>" not in picture] == []


def test_each_sentence_fits_its_box():
    sentences = [says(FILES[f"lightning_peft.{name}"]) for name in arrows()]
    assert [text for text in sentences if len(textwrap.wrap(text, 66, break_on_hyphens=False)) > 2] == []


@pytest.mark.parametrize("page", PAGES)
def test_files_and_functions_that_a_page_names_exist(page):
    named = [(path, name) for path, name in references(prose(page)) if path not in TO_COME]
    assert len(named) >= PAGES[page]
    assert [path for path, _ in named if locate(path) is None] == []
    assert [f"{path}:{name}" for path, name in named if name and not defines(locate(path), name)] == []


def test_tests_that_a_page_says_to_run_exist():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/**/*.md")]
    made = {"tests/methods/test_rank_one.py", "tests/dense.py", "tests/gate.py"}  # by readers of CONTRIBUTING.md
    named = {path for page in pages for path in re.findall(r"\btests/[\w/]+\.py", page.read_text())} - made
    assert len(named) > 10
    assert sorted(path for path in named if not (ROOT / path).is_file()) == []


@pytest.mark.parametrize("page", [*PAGES, "README.md"])
def test_links_of_a_page_lead_to_files(page):
    found = links(page)
    assert len(found) > 5
    assert [path for path in found if not path.exists()] == []


def test_links_lead_to_the_file_that_their_text_names():
    pairs = [
        (text, (ROOT / page).parent / target)
        for page in PAGES
        for text, target in re.findall(r"\[`([\w/.-]+)(?::[\w.]+)?`\]\(([^)]+)\)", prose(page))
    ]
    assert len(pairs) > 80
    assert [text for text, target in pairs if locate(text) != target.resolve()] == []


def test_names_that_do_not_exist_are_found():
    assert references("`core/no.py:f` and `a.b` and `tests/laws/` and `x.py`") == [
        ("core/no.py", "f"),
        ("tests/laws/", ""),
        ("x.py", ""),
    ]
    assert locate("core/no.py") is None
    assert defines(PACKAGE / "core/adapted_module.py", "adapted_class.forward")
    assert not defines(PACKAGE / "core/adapted_module.py", "adapted_class.backward")


def test_blocks_of_the_page_run():
    found = blocks(PAGE, "python")
    assert len(found) == 1
    for text in found:
        assert execute(text, "architecture").torch is torch


class Projection(nn.Linear):
    """A layer that no other test adapts, so that the subclass for adapted ones is made here for the first time."""


class Task(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)  # the same base for each
        self.query = Projection(8, 8)

    def training_step(self, batch, index):
        return self.query(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def entered(call):
    """Return the functions of the package that a call enters, as `file:name`, in the order of their first entry."""
    found = {}

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(f"{PACKAGE}/"):
            file = code.co_filename.removeprefix(f"{PACKAGE}/")
            found[f"{file}:{code.co_qualname.replace('.<locals>', '')}"] = None

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return list(found)


def told(heading):
    """Return the functions that the numbered steps below a heading link to."""
    text = re.split(r"^#+ ", prose(PAGE).partition(f"# {heading}\n")[2], flags=re.M)[0]
    steps = text[text.index("1. ") :].split("\n\n")[0]
    return [f"{path}:{name}" for path, name in references(steps) if name]


def fit(module, folder, path=None):
    saving = ModelCheckpoint(folder, save_last=True)
    tuner = trainer(lp.PEFTStrategy(lp.LoRA(targets=["query"]), show_summary=False), saving, epochs=2 if path else 1)
    tuner.fit(module, DataLoader(torch.ones(2, 8), batch_size=2), ckpt_path=path)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="before Python 3.11 code does not know its qualified name")
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_what_runs_is_what_the_page_tells_in_this_order(tmp_path):
    module = Task()
    ran = {"From `Trainer.fit` to the first adapted forward": entered(lambda: fit(module, tmp_path))}
    ran["Saving"] = ran["From `Trainer.fit` to the first adapted forward"]
    ran["Resuming"] = entered(lambda: fit(Task(), tmp_path, tmp_path / "last.ckpt"))
    ran["Adapter folders"] = entered(lambda: lp.load_adapter(Task(), lp.save_adapter(module, tmp_path / "adapter")))
    for heading, functions in ran.items():
        steps = list(dict.fromkeys(told(heading)))
        assert len(steps) >= 5
        assert [step for step in steps if step not in functions] == []
        assert sorted(steps, key=functions.index) == steps
