"""What differs between a file and a model is said with both sides."""

import pytest
from models import MODELS
from trainer_models import data, module, trainer

import lightning_peft as lp


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoint of a run with LoRA of rank 2 on queries, and norms."""
    path = tmp_path_factory.mktemp("run") / "last.ckpt"
    strategy = lp.PEFTStrategy(lp.LoRA(rank=2, targets=["attention.query"]), also_train=["norms"])
    runner = trainer(strategy)
    runner.fit(module(), data())
    runner.save_checkpoint(path)
    return path


@pytest.mark.parametrize(
    ("method", "also_train", "said"),
    [
        (lp.LoRA(rank=3, targets=["attention.query"]), ["norms"], r"rank of LoRA is 2 in The checkpoint and 3 here"),
        (
            lp.LoRA(rank=2, targets=["attention.key"]),
            ["norms"],
            r"targets of LoRA is \['attention.query'\] in The checkpoint and \['attention.key'\] here",
        ),
        (lp.IA3(), ["norms"], "the method is LoRA in The checkpoint and IA3 here"),
        (
            lp.LoRA(rank=2, targets=["attention.query"]),
            ["embed_tokens"],
            r"also_train is \['norms'\] in The checkpoint and \['embed_tokens'\] here.*also_train=\['norms'\] to go on",
        ),
        (
            lp.LoRA(rank=2, targets=["attention.query"]),
            [],
            r"also_train is \['norms'\] in The checkpoint and \[\] here",
        ),
    ],
    ids=["rank", "targets", "method", "also_train", "nothing"],
)
def test_resuming_with_other_settings_names_both_sides(saved, method, also_train, said):
    with pytest.raises(ValueError, match=said):
        trainer(lp.PEFTStrategy(method, also_train=also_train)).fit(module(), data(), ckpt_path=saved)


def test_patterns_that_mean_the_same_parameters_are_no_difference(tmp_path):
    method = lp.LoRA(rank=2, targets=["query"])
    lp.save_adapter(lp.inject(MODELS["bert"](), method, ["classifier"]), tmp_path / "adapter")
    model = lp.inject(MODELS["bert"](), method, ["classifier.weight", "classifier.bias"])
    assert lp.load_adapter(model, tmp_path / "adapter") is model
    with pytest.raises(ValueError, match=r"also_train is \['classifier'\] in .* and \['classifier.bias'\] here"):
        lp.load_adapter(lp.inject(MODELS["bert"](), method, ["classifier.bias"]), tmp_path / "adapter")
