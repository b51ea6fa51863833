"""The picture of the rooms is drawn from the imports that are there."""

import textwrap

from docs.draw_rooms import FILES, ORDER, PICTURE, arrows, draw, says


def test_the_picture_is_what_the_script_draws_from_the_imports():
    assert PICTURE.read_text() == draw(), "run python docs/draw_rooms.py"


def test_the_picture_has_each_room_with_its_sentence_and_a_dot_for_each_arrow():
    found = arrows()
    assert list(found) == [name for name in ORDER if name != "__main__"]
    assert found["ops"] == []
    assert found["core"] == ["ops", "structure"]
    picture = draw()
    assert picture.count("<circle") == sum(map(len, found.values()))
    assert picture.count('class="room"') == len(found)
    assert ">The methods, one file each.<" in picture


def test_each_sentence_fits_its_box():
    sentences = [says(FILES[f"lightning_peft.{name}"]) for name in arrows()]
    assert [text for text in sentences if len(textwrap.wrap(text, 66)) > 2] == []
