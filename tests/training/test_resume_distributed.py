"""Two processes resume with the same rows and weights as if they had not stopped."""

import logging
import warnings
from pathlib import Path

import pytest
from processes import together
from resume_cases import KINDS, fit, outcome, saving

import lightning_peft as lp

SAMPLE = ["in order", "shuffled", "shuffled, 2 workers", "shuffled, 2 persistent workers", "own sampler", "iterable"]
SAMPLE += ["own batch sampler", "rows with random numbers", "own state_dict"]
STRATEGIES = {"ddp": lambda: "ddp", "fsdp2": lp.FSDP2Strategy}


def resume_everywhere(folder, name):
    """Return what each kind of loader comes to, by where the run stopped, in this process."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    found = {}
    for number, kind in enumerate(SAMPLE):
        place, reads = Path(folder, str(number)), bool(number % 2)
        settings = {"strategy": STRATEGIES[name](), "devices": 2, "use_distributed_sampler": "batch" not in kind}
        whole = fit(KINDS[kind], reads, *saving(place), **settings)
        steps = len(whole.seen) // 3
        stops = {
            f"step={steps // 2}": steps // 2,
            "end-epoch=0": steps,
            f"step={steps}": steps,
            f"step={steps + 1}": steps + 1,
        }
        for stop, done in stops.items():
            settings["strategy"] = STRATEGIES[name]()
            again = fit(KINDS[kind], reads, path=place / f"{stop}.ckpt", seed=99, **settings)
            found[kind, stop] = outcome(whole, again, done)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_two_processes_resume_with_the_same_rows_and_weights(name, tmp_path):
    for rank, found in enumerate(together(resume_everywhere, str(tmp_path), name)):
        assert len(found) == 4 * len(SAMPLE)
        assert {place: what for place, what in found.items() if what != "equal"} == {}, rank
