"""The quick suite runs every pair of model, method and law that there is, and the slow suite what is left."""

from cases import CASES
from models import MODELS
from sampling import method_of
from test_contract import GENERATING, RECOMPUTING, law


def test_every_case_has_a_name_of_its_own():
    assert len({str(case) for case in CASES}) == len(CASES) >= 230


def test_models_are_known_by_what_they_can():
    made = {name: model() for name, model in MODELS.items()}
    can = {name: hasattr(model, "gradient_checkpointing_enable") for name, model in made.items()}
    assert {name for name, yes in can.items() if yes} == RECOMPUTING
    assert {name for name, model in made.items() if callable(getattr(model, "generate", None))} == GENERATING


def test_each_case_is_in_the_quick_suite_under_some_law():
    assert {str(case) for cases in law.quick.values() for case in cases} == {str(case) for case in CASES}


def test_each_law_runs_quickly_over_every_method_and_every_model_that_it_applies_to():
    assert len(law.quick) >= 15
    for kind in (method_of, lambda case: case.model):
        quick, everything = ({name: set(map(kind, cases)) for name, cases in t.items()} for t in (law.quick, law.cases))
        assert quick == everything


def test_the_quick_suite_is_a_small_part():
    quick, everything = (sum(map(len, table.values())) for table in (law.quick, law.cases))
    assert quick < everything / 5
