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


@pytest.mark.parametrize(("tasks", "count"), [(1, 77_668), (8, 76_800 + 8 * 868)])
def test_multitask_prompts_on_t5_base(tasks, count):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32128, d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
    assert trained(T5ForConditionalGeneration, config, lp.MultitaskPromptTuning(tasks=tasks)) == count
    assert trained(T5ForConditionalGeneration, config, lp.PromptTuning(tasks=tasks)) == 76_800 * tasks


def test_bitfit_on_bert_base():
    from transformers import BertConfig, BertModel

    assert trained(BertModel, BertConfig(), lp.BitFit()) == 102_912


def test_output_layers_of_distilbert():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    assert trained(DistilBertForSequenceClassification, DistilBertConfig(num_labels=2), lp.OutputLayers()) == 592_130


def linear_layers(*sizes):
    return torch.nn.Sequential(*(torch.nn.Linear(a, b, bias=False) for a, b in zip(sizes, sizes[1:], strict=False)))


@pytest.mark.slow
def test_adalora_on_deberta_v3_base():
    from transformers import DebertaV2Config, DebertaV2Model

    config = DebertaV2Config(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, vocab_size=1000,
        position_buckets=256, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True,
    )  # fmt: skip
    for rank in (1, 12):
        found = trained(DebertaV2Model, config, lp.AdaLoRA(initial_rank=rank, target_rank=1))
        diagonals = rank * 72  # E, which the published count leaves out
        assert found - diagonals == rank * 165_888


class Wide(torch.nn.Module):
    """The projections of 96 blocks, 12,288 wide."""

    def __init__(self, width):
        super().__init__()
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({name: torch.nn.Linear(width, width) for name in names}) for _ in range(96)
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "targets", "count"),
    [
        (1, ["attention.query", "attention.value"], 4_718_592),
        (8, ["attention.query", "attention.value"], 37_748_736),
        (2, ["attention.query", "attention.key", "attention.value", "attention.output"], 18_874_368),
        (4, ["attention.query", "attention.key", "attention.value", "attention.output"], 37_748_736),
    ],
)
def test_lora_on_gpt3(rank, targets, count):
    assert trained(Wide, 12_288, lp.LoRA(rank=rank, targets=targets)) == count


def test_fedpara():
    assert trained(lambda _: linear_layers(256, 256), None, lp.FedPara(rank=16, targets=["0"])) == 16_384
    conv = lambda _: torch.nn.Sequential(torch.nn.Conv2d(256, 256, 3, bias=False))  # noqa: E731
    assert trained(conv, None, lp.FedPara(rank=16, targets=["0"], cores=False)) == 81_920
    assert trained(conv, None, lp.FedPara(rank=16, targets=["0"])) == 20_992


def test_pfedpara_transfers_half():
    with torch.device("meta"):
        model = linear_layers(784, 256, 62)
    assert sum(p.numel() for p in model.parameters()) == 216_576
    lp.inject(model, lp.FedPara(gamma=0.5, personalized=True, targets=["0", "1"]))
    assert [adapter.x1.shape[1] for *_, adapter in lp.adapters(model)] == [56, 16]
    sizes = [sum(v.numel() for v in state(model).values()) for state in (lp.global_state, lp.local_state)]
    assert sizes == [63_328, 63_328]
    assert lp.summary(model).trainable == 126_656


@pytest.mark.parametrize(
    ("width", "inner", "layers", "heads", "count"),
    [(4096, 11008, 32, 32, 159_907_840), (8192, 22016, 80, 64, 799_539_200)],
    ids=["7b", "65b"],
)
def test_qlora_on_llama(width, inner, layers, heads, count):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads
    )
    assert trained(LlamaForCausalLM, config, lp.LoRA(rank=64, targets=["all-linear"])) == count


@pytest.mark.parametrize(
    ("width", "inner", "heads", "count"),
    [(2048, 5120, 32, 540_672), (4096, 10240, 64, 1_081_344)],
    ids=["3b", "11b"],
)
def test_ia3_on_t0(width, inner, heads, count):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32128, d_model=width, d_kv=64, d_ff=inner, num_layers=24, num_heads=heads,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    assert trained(T5ForConditionalGeneration, config, lp.IA3()) == count


@pytest.mark.parametrize(
    ("layers", "width", "adapters", "norms", "head"),
    [(24, 1024, 6_343_680, 100_352, 2_050), (12, 768, 2_379_264, 38_400, 1_538)],
    ids=["large", "base"],
)
def test_bottlenecks_on_bert(layers, width, adapters, norms, head):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64
    )
    for train_norms, train_head in ((False, False), (True, False), (False, True), (True, True)):
        method = lp.Bottleneck(size=64, train_norms=train_norms, train_head=train_head)
        count = adapters + norms * train_norms + head * train_head
        assert trained(BertForSequenceClassification, config, method) == count
    assert layers != 24 or count == 6_446_082


def test_one_bottleneck_of_24():
    method = lp.Bottleneck(size=24, targets=["0"], train_head=False)
    assert trained(lambda _: linear_layers(1024, 1024), None, method) == 49_152 + 1024 + 24


@pytest.mark.slow
def test_parallel_adapters_on_bart_large():
    from transformers import BartConfig, BartForConditionalGeneration

    for size, count in ((200, 9_830_400), (512, 25_165_824), (1024, 50_331_648)):
        assert trained(BartForConditionalGeneration, BartConfig(), lp.ParallelAdapter(size=size)) == count


def test_llama_adapter_v2_on_llama_7b():
    from transformers import LlamaConfig, LlamaForCausalLM

    both = lp.LLaMAAdapter(train_norms=True, bias_and_scale=True)
    assert trained(LlamaForCausalLM, LlamaConfig(), both) == 1_229_760 + 2_985_984
    norms = lp.LLaMAAdapter(train_norms=True)
    assert trained(LlamaForCausalLM, LlamaConfig(), norms) == 1_229_760 + 65 * 4096


@pytest.mark.parametrize(
    ("settings", "count"),
    [({"reparameterize": False}, 245_760), ({"hidden_size": 512}, 25_744_896), ({}, 25_744_896)],
    ids=["plain", "perceptron", "default"],
)
def test_a_prefix_of_5_on_gpt2_medium(settings, count):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
    assert trained(GPT2LMHeadModel, config, lp.PrefixTuning(length=5, **settings)) == count


def test_a_prefix_of_20_in_the_decoder_of_t5_large():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32128, d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16)
    method = lp.PrefixTuning(length=20, reparameterize=False, targets=["decoder.*.SelfAttention"])
    assert trained(T5ForConditionalGeneration, config, method) == 983_040


@pytest.mark.slow
def test_a_prefix_of_30_on_bart_large():
    from transformers import BartConfig, BartForConditionalGeneration

    method = lp.PrefixTuning(length=30, reparameterize=False)
    assert trained(BartForConditionalGeneration, BartConfig(), method) == 2 * 30 * 1024 * 36
    mam = [method, lp.ParallelAdapter(size=512)]
    assert trained(BartForConditionalGeneration, BartConfig(), mam) == 27_377_664


def test_a_prefix_is_as_wide_as_grouped_heads():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=2, num_key_value_heads=8)
    assert trained(LlamaForCausalLM, config, lp.PrefixTuning(length=20, reparameterize=False)) == 2 * 2 * 20 * 1024


@pytest.mark.slow
def test_p_tuning_v2():
    from transformers import BertConfig, BertForTokenClassification, RobertaConfig, RobertaForSequenceClassification

    config = BertConfig(num_labels=9)
    assert trained(BertForTokenClassification, config, lp.PTuningV2(length=5, projection=True)) == 9_860_105
    config = RobertaConfig(num_hidden_layers=24, hidden_size=1024, intermediate_size=4096, num_attention_heads=16)
    for length, count in ((8, 393_216), (224, 11_010_048)):
        method = lp.PTuningV2(length=length, train_head=False)
        assert trained(RobertaForSequenceClassification, config, method) == count
    head = 1024 * 1024 + 1024 + 1024 * 2 + 2
    assert trained(RobertaForSequenceClassification, config, lp.PTuningV2(length=8)) == 393_216 + head


@pytest.mark.slow
def test_p_tuning_on_lama_and_fewglue():
    from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel, GPT2Config, GPT2Model

    gpt2 = GPT2Config(n_embd=1024, n_layer=2, n_head=16)
    assert trained(GPT2Model, gpt2, lp.PTuning(template="[P:3] {subject} [P:3]")) == 14_704_640
    template = "[P:3] {mask} [P:3] {subject} [P:3]"
    assert trained(BertModel, BertConfig(num_hidden_layers=2), lp.PTuning(template=template)) == 8_278_272
    albert = AlbertConfig(embedding_size=128, hidden_size=4096, num_attention_heads=64, intermediate_size=16384)
    fewglue = lp.PTuning(template="{premise} Question: {hypothesis} ? [P] Answer: {mask} .", hidden_size=256)
    assert trained(AlbertModel, albert, fewglue) == 708_992
