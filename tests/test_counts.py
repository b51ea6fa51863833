"""Published parameter counts, on the meta device."""

import pytest
import torch

import lightning_peft as lp


def trained(build, config, method):
    with torch.device("meta"):
        model = build(config)
    lp.inject(model, method)
    assert all(parameter.is_meta for parameter in model.parameters())
    return lp.summary(model).trainable


def test_llama_adapter_on_llama_7b():
    from transformers import LlamaConfig, LlamaForCausalLM

    assert trained(LlamaForCausalLM, LlamaConfig(), lp.LLaMAAdapter(length=10, layers=30)) == 1_229_760
    assert trained(LlamaForCausalLM, LlamaConfig(), lp.LLaMAAdapter()) == 1_229_760


@pytest.mark.parametrize(("layers", "width", "count"), [(12, 768, 294_912), (24, 1024, 786_432)], ids=["base", "large"])
def test_lora_on_roberta(layers, width, count):
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64
    )
    assert trained(RobertaModel, config, lp.LoRA(rank=8, targets=["query", "value"])) == count
    assert trained(RobertaModel, config, lp.LoRA()) == count


def test_a_prompt_of_5_on_t5_xxl():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
    assert trained(T5ForConditionalGeneration, config, lp.PromptTuning(length=5)) == 20_480


def test_bitfit_on_bert_base():
    from transformers import BertConfig, BertModel

    assert trained(BertModel, BertConfig(), lp.BitFit()) == 102_912


def test_output_layers_of_distilbert():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    assert trained(DistilBertForSequenceClassification, DistilBertConfig(num_labels=2), lp.OutputLayers()) == 592_130
