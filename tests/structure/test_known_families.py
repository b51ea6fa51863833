"""Families that are not traced: their names tell what a trace finds, for each of the usual heads."""

import pytest
from installed import needs
from torch import nn

from lightning_peft.structure.fused_rows import fused_rows, is_fused
from lightning_peft.structure.known_families import KNOWN_FAMILIES
from lightning_peft.structure.named_structure import named_structure
from lightning_peft.structure.tracing.example_inputs import example_inputs
from lightning_peft.structure.tracing.hollow_twin import hollow_twin
from lightning_peft.structure.tracing.measured_structure import measured_structure

transformers = pytest.importorskip("transformers")

USUAL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**USUAL, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "bert": USUAL,
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "electra": USUAL | {"embedding_size": 16},
    "roberta": USUAL,
    "vit": USUAL | {"image_size": 16, "patch_size": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    **dict.fromkeys(("t5", "mt5"), {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}),
}
HEADS = {
    *("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"),
    *("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForImageClassification"),
    *("AutoModelForQuestionAnswering",),
}


def models(family):
    """Yield (head, model) of a family, tiny."""
    sizes = SIZES.get(family, DECODER)
    common = {} if family == "vit" else {"vocab_size": 64}
    for head in sorted(HEADS):
        labels = {"num_labels": 2 if head.endswith("Answering") else 3}
        config = transformers.AutoConfig.for_model(family, **common, **sizes, **labels)
        auto = getattr(transformers, head)
        if type(config) in auto._model_mapping:
            yield head, auto.from_config(config)


def after_the_last_block(structure, model):
    """Return the modules with parameters of their own that follow the last block."""
    called = list(structure.names["called"])
    following = called[max(map(called.index, structure.names["blocks"])) :]
    return {name for name in following if any(True for _ in model.get_submodule(name).parameters(recurse=False))}


QUICK = {"bert", "distilbert", "gemma3_text", "gpt2", "llama", "qwen2", "t5", "vit"}
FAMILIES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in sorted(KNOWN_FAMILIES)]


@needs("transformers")
@pytest.mark.parametrize("family", FAMILIES)
def test_names_tell_what_a_trace_finds(family):
    heads = 0
    for head, model in models(family):
        twin = hollow_twin(model)
        measured, named = measured_structure(model, twin, example_inputs(twin)), named_structure(model)
        for key in set(named.names) - {"called"}:
            assert list(named.names[key]) == list(measured.names[key]), (head, key)
        for key in ("read", "unused", "zero_inputs"):
            assert measured.names[key] == [], (head, key)
        assert dict(named.feedforward) == dict(measured.feedforward), head
        for name, rows in measured.rows.items():
            layer: nn.Module = model.get_submodule(name)
            assert (fused_rows(layer, name) if is_fused(name, layer) else None) == rows, (head, name)
        assert after_the_last_block(named, model) == after_the_last_block(measured, model), head
        heads += 1
    assert heads > 0
