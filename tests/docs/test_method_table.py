"""What the tables of docs/methods/index.md say of merging, rows and HF PEFT is what methods do on a small Llama."""

import copy
import re
from pathlib import Path

import pytest
import torch
from installed import needs
from reader import llama

import lightning_peft as lp

PAGE = Path(__file__).parents[2] / "docs/methods/index.md"
METHODS = {
    "lora": lp.LoRA(rank=2),
    "dora": lp.LoRA(rank=2, decompose=True),
    "adalora": lp.AdaLoRA(initial_rank=3, target_rank=2),
    "fedpara": lp.FedPara(rank=2),
    "krona": lp.KronA(factor=4),
    "krona_block": lp.KronABlock(),
    "ia3": lp.IA3(),
    "bitfit": lp.BitFit(),
    "bottleneck": lp.Bottleneck(size=4),
    "parallel_adapter": lp.ParallelAdapter(size=4),
    "mam": [lp.PrefixTuning(length=2, hidden_size=8), lp.ParallelAdapter(size=4)],
    "prefix_tuning": lp.PrefixTuning(length=2, hidden_size=8),
    "p_tuning_v2": lp.PTuningV2(length=2),
    "llama_adapter": lp.LLaMAAdapter(length=2),
    "prompt_tuning": lp.PromptTuning(length=2),
    "multitask_prompt_tuning": lp.MultitaskPromptTuning(length=2),
    "p_tuning": lp.PTuning(length=2),
    "trainable_tokens": lp.TrainableTokens(tokens=[3, 7]),
    "output_layers": lp.OutputLayers(),
    "last_layers": lp.LastLayers(),
}
WITHOUT_MEASUREMENT = {"qlora", "t_few", "feature_based", "full_fine_tuning"}  # LoRA's, IA3's, none, none to share
IDS = torch.arange(24).view(3, 8) + 5


def rows_of_tables():
    found = re.findall(r"^\| \[[^\]]+\]\((\w+)\.md\) \|(.+)\|$", PAGE.read_text(encoding="utf-8"), re.M)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in found}


TABLE = rows_of_tables()


def network(method):
    torch.manual_seed(1)
    if method != lp.BitFit():
        return llama()
    from transformers import LlamaConfig, LlamaForCausalLM

    like = llama().config.to_dict() | {"attention_bias": True}  # Llama has no biases unless it is told so
    return LlamaForCausalLM(LlamaConfig(**like))


def adapted(method, names=("",)):
    model = network(method)
    for name in names:
        lp.add_adapter(model, method, name) if name else lp.inject(model, method)
    with torch.no_grad():
        for *_, adapter in lp.adapters(model):
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) / 20)
    lp.finalize(model)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_the_tables_have_a_row_for_each_page_and_method():
    pages = {path.stem for path in PAGE.parent.glob("*.md")} - {"index"}
    assert pages <= set(TABLE)
    assert set(TABLE) == set(METHODS) | WITHOUT_MEASUREMENT
    used = {type(m) for ms in METHODS.values() for m in (ms if isinstance(ms, list) else [ms])}
    public = {getattr(lp, name) for name in lp.__all__ if isinstance(getattr(lp, name), type)}
    public = {cls for cls in public if issubclass(cls, lp.Method)}
    assert public - used == {lp.Method, lp.OwnParameters, lp.FullFineTuning}


@pytest.mark.slow
@needs("transformers")
@pytest.mark.parametrize("name", METHODS)
def test_what_the_table_says_of_merging_is_true(name):
    model = adapted(METHODS[name])
    before, says = logits(model), TABLE[name][2]
    if says == "no":
        with pytest.raises(TypeError, match="cannot be merged"):
            lp.merge(model)
        return
    assert says.startswith("yes" if any(lp.adapters(model)) else "already in the base")
    lp.merge(model)
    assert list(lp.adapters(model)) == []
    torch.testing.assert_close(logits(model), before)


@pytest.mark.slow
@needs("transformers")
@pytest.mark.parametrize("name", METHODS)
def test_what_the_table_says_of_rows_is_true(name):
    model, says = adapted(METHODS[name], "ab"), TABLE[name][3]
    third = "a" if says.endswith("each row has one") else None
    if says == "no":
        with (
            pytest.raises(TypeError, match="rows can have different adapters only"),
            lp.row_adapters(model, ["a", "b"]),
        ):
            logits(model)
        return
    with lp.row_adapters(model, ["a", "b", third]):
        together = logits(model)
    for row, one in enumerate(["a", "b", third]):
        model_of_row = copy.deepcopy(model)
        with lp.disabled(model_of_row) if one is None else lp.row_adapters(model_of_row, [one]):
            torch.testing.assert_close(together[row], logits(model_of_row)[row])
    stacked = {bool(adapter.per_example_tensors()) for *_, adapter in lp.adapters(model) if not adapter.replaces}
    assert stacked in ({says.startswith("stacked")}, set())


@pytest.mark.slow
@needs("transformers")
@pytest.mark.parametrize("name", METHODS)
def test_what_the_table_says_of_hf_peft_is_true(name, tmp_path):
    model, says = adapted(METHODS[name]), TABLE[name][4]
    if says.startswith("no"):
        with pytest.raises(ValueError, match="HF PEFT"):
            lp.export_peft(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    assert says.startswith("yes")
    lp.export_peft(model, tmp_path / "out")
    back = network(METHODS[name])
    lp.import_peft(back, tmp_path / "out")
    torch.testing.assert_close(logits(back.eval()), logits(model))


@pytest.mark.slow
@needs("transformers")
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("bitfit", lp.BitFit(add_missing=True)),
        ("prefix_tuning", lp.PrefixTuning(length=2, reparameterize=False, shift_positions=True)),
    ],
)
def test_where_a_setting_makes_the_difference_the_table_names_it(name, method, tmp_path):
    setting = TABLE[name][4].partition("`")[2].rstrip("`")
    assert getattr(method, setting) is True
    assert lp.export_peft(adapted(method), tmp_path / "out") == tmp_path / "out"
