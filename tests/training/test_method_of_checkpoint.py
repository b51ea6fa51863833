"""``PEFTStrategy()`` evaluates with the method that its checkpoint says."""

import pytest
import torch
from trainer_models import PLACES, data, module, trainer

import lightning_peft as lp

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint, and what its model predicts."""
    folder = tmp_path_factory.mktemp("saved")
    tuned = module()
    tuner = trainer(lp.PEFTStrategy(lp.LoRA(rank=2, alpha=9), also_train=["norm"], show_summary=False), max_steps=2)
    tuner.fit(tuned, data())
    tuner.save_checkpoint(folder / "trained.ckpt")
    return folder / "trained.ckpt", torch.cat(trainer().predict(tuned, data()))


@pytest.mark.parametrize("place", PLACES)
def test_predict_reads_the_method_from_the_checkpoint(place, saved):
    path, expected = saved
    fresh = module(place=place)
    found = trainer(lp.PEFTStrategy()).predict(fresh, data(), ckpt_path=path)
    assert torch.equal(torch.cat(found), expected)
    assert lp.active(fresh) == ("lora",)
    (rank,) = {adapter.a.shape[0] for *_, adapter in lp.adapters(fresh)}
    assert rank == 2


@pytest.mark.slow
@pytest.mark.parametrize("function", ["validate", "test"])
def test_validate_and_test_do_so_too(function, saved):
    path, _ = saved
    (given,) = getattr(trainer(lp.PEFTStrategy(lp.LoRA(rank=2, alpha=9), also_train=["norm"])), function)(
        module(), data(), ckpt_path=path, verbose=False
    )
    (found,) = getattr(trainer(lp.PEFTStrategy()), function)(module(), data(), ckpt_path=path, verbose=False)
    assert given == found
    assert len(found) >= 1


def test_without_a_checkpoint_nothing_is_evaluated(saved):
    with pytest.raises(ValueError, match="nothing was injected: give the Trainer ckpt_path, PEFTStrategy a method"):
        trainer(lp.PEFTStrategy()).predict(module(), data())
    with pytest.raises(ValueError, match="without a method trains what was injected before, and nothing was"):
        trainer(lp.PEFTStrategy()).fit(module(), data())
    with pytest.raises(ValueError, match="without a method trains what was injected before, and nothing was"):
        trainer(lp.PEFTStrategy(full_checkpoint=True)).predict(module(), data(), ckpt_path=saved[0])


def test_the_base_of_the_checkpoint_is_checked(saved):
    other = module()
    torch.nn.init.ones_(other.net.model.layers[0].mlp.up_proj.weight)
    with pytest.raises(ValueError, match="belongs to another base model"):
        trainer(lp.PEFTStrategy()).predict(other, data(), ckpt_path=saved[0])
