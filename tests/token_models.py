"""Models that share their input embeddings with other layers, and one that does not; a tokenizer without a network."""

import torch
from models import MODELS, tokens

IDS = [5, 11, 40]


def tied_llama():
    from transformers import LlamaForCausalLM

    config = MODELS["llama"]().config
    config.tie_word_embeddings = True
    return LlamaForCausalLM(config)


def gemma():
    """Scales its embeddings by a number that bfloat16 rounds."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.1,
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def masked_bert():
    """Its tied head has a bias."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        initializer_range=0.1,
    )  # fmt: skip
    return BertForMaskedLM(config)


MAKE = {
    "llama": MODELS["llama"].make, "tied": tied_llama, "gemma": gemma, "bert": masked_bert, "t5": MODELS["t5"].make,
    "bart": MODELS["bart"].make,
}  # fmt: skip


def build(name, dtype=torch.float32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MAKE[name]().to(dtype).eval()


def inputs(name):
    """Return rows that hold each of ``IDS``."""
    ids = tokens(2, 9)
    ids[:, :3] = torch.tensor(IDS)
    return {"input_ids": ids} | ({"decoder_input_ids": ids.flip(1)} if name in ("t5", "bart") else {})


def moved(model):
    """Give the rows that train other values."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def tokenizer(count=64):
    """Return a tokenizer of ``count`` tokens: w0, w1, ..."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))  # noqa: S106
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")  # noqa: S106
