"""Pictures of methods are what the script draws, and say in one language what is frozen and what trains."""

import re
from xml.etree import ElementTree

import pytest

from docs.draw_methods import FOLDER, draw
from docs.drawing.picture import FILLS, HEIGHT, WIDTH, Picture

PICTURES = draw()
PAGES = sorted(path.stem for path in FOLDER.parent.glob("*.md") if path.stem != "index")
NOTHING_IN_THE_MODEL_IS_FROZEN = {"full_fine_tuning"}


def test_the_pictures_in_the_repository_are_those_that_the_script_draws():
    stored = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.svg")}
    assert stored == PICTURES, "run python docs/draw_methods.py"


@pytest.mark.parametrize("page", PAGES)
def test_each_page_of_a_method_shows_the_picture_of_this_method(page):
    shown = re.findall(
        r"!\[[^\]]+\]\(pictures/(\w+)\.svg\)", (FOLDER.parent / f"{page}.md").read_text(encoding="utf-8")
    )
    assert shown == [page]


def test_each_picture_is_sound_and_has_a_legend_for_its_colours():
    for name, svg in PICTURES.items():
        root = ElementTree.fromstring(svg)  # noqa: S314  # drawn here
        texts = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
        assert root.get("viewBox") == f"0 0 {WIDTH} {HEIGHT}"
        assert "trained" in texts, name
        assert ("frozen" in texts) == (name not in NOTHING_IN_THE_MODEL_IS_FROZEN), name
        assert ("trained, dropped afterwards" in texts) == (FILLS["training"] in svg), name


def test_text_that_would_be_cut_off_is_refused():
    picture = Picture("a method")
    with pytest.raises(ValueError, match="leaves the picture of a method"):
        picture.text(500, 100, "far too long for the right margin")
    with pytest.raises(ValueError, match="the box has 40 x 30"):
        picture.box(10, 60, 40, 30, "longer than the box")
