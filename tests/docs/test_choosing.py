"""What docs/choosing.md says does not fit a kind of model is what methods refuse there, and nothing else is."""

import re
import warnings
from pathlib import Path

import pytest
from installed import needs
from method_classes import METHODS
from reader import bert, llama

import lightning_peft as lp

PAGE = Path(__file__).parents[2] / "docs/choosing.md"
SETTINGS = {
    "lora": {"rank": 2, "targets": ["all-linear"]},  # by name where there is no attention, as the page says
    "adalora": {"initial_rank": 2, "target_rank": 1},
    "fedpara": {"rank": 2},
    "krona": {"targets": ["all-linear"]},
    "p_tuning": {"length": 2},
    "trainable_tokens": {"tokens": [3]},
}
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def t5(t):
    return t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=60, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


def whisper(t):
    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
    }
    config = t.WhisperConfig(
        vocab_size=60, d_model=16, num_mel_bins=8, max_source_positions=20, max_target_positions=16, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        **sides,
    )  # fmt: skip
    return t.WhisperForConditionalGeneration(config)


def wav2vec2(t):
    config = t.Wav2Vec2Config(
        vocab_size=60, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, **SIZES,
    )  # fmt: skip
    return t.Wav2Vec2ForCTC(config)


KINDS = {
    "BERT": lambda t: bert(),
    "Llama": lambda t: llama(),
    "T5": t5,
    "DeBERTa": lambda t: t.DebertaV2ForSequenceClassification(t.DebertaV2Config(vocab_size=60, **SIZES)),
    "Mixtral": lambda t: t.MixtralForCausalLM(
        t.MixtralConfig(vocab_size=60, num_key_value_heads=2, num_local_experts=2, **SIZES)
    ),
    "ViT": lambda t: t.ViTForImageClassification(t.ViTConfig(image_size=16, patch_size=8, **SIZES)),
    "Wav2Vec2": wav2vec2,
    "Whisper": whisper,
    "ResNet": lambda t: t.ResNetForImageClassification(
        t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ),
}


def stems(text):
    return set(re.findall(r"\]\(methods/(\w+)\.md\)", text))


def said_not_to_fit():
    _, _, section = PAGE.read_text(encoding="utf-8").partition("## By kind of model")
    table = re.findall(r"^\| (\w+)[^|]* \| ([^|]+) \| [^|]+ \|$", section.partition("\n## ")[0], re.M)
    return {kind: stems(cell) for kind, cell in table if stems(cell)} | {"BERT": set()}


def test_the_table_has_a_row_for_each_kind():
    assert set(said_not_to_fit()) == set(KINDS)


@pytest.mark.slow
@needs("transformers")
@pytest.mark.parametrize("kind", KINDS)
def test_methods_refuse_a_kind_of_model_where_the_page_says_so(kind):
    import transformers

    refused, model = {}, KINDS[kind](transformers)
    for name, method in METHODS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what a role leaves out is another matter
                lp.inject(model, method(**SETTINGS.get(name, {})))
            lp.detach(model)
        except (TypeError, ValueError) as reason:
            refused[name] = str(reason)
    assert set(refused) == said_not_to_fit()[kind], refused


def test_each_method_is_named_on_the_page_of_choices():
    named = stems(PAGE.read_text(encoding="utf-8"))
    assert set(METHODS) | {"dora", "qlora", "t_few", "feature_based"} <= named
