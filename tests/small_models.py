"""Models of one block, of more families than the laws run over."""

from models import MODELS
from torch import nn


def small(name):
    import transformers as t

    like_bert = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
                 "num_attention_heads": 2}  # fmt: skip
    like_gpt2 = {"vocab_size": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    like_bart = {"vocab_size": 8, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 12,
                 "decoder_ffn_dim": 12, "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    like_t5 = {"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    made = {
        "bert, masks": lambda: t.BertForMaskedLM(t.BertConfig(**like_bert)),
        "bert, alone": lambda: t.BertModel(t.BertConfig(**like_bert)),
        "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**like_bert)),
        "deberta": lambda: t.DebertaV2ForSequenceClassification(t.DebertaV2Config(**like_bert)),
        "llama, classes": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**like_bert)),
        "gpt2, crossing": lambda: t.GPT2Model(t.GPT2Config(**like_gpt2, add_cross_attention=True)),
        "gpt2, two heads": lambda: t.GPT2DoubleHeadsModel(t.GPT2Config(**like_gpt2)),
        "bart, classes": lambda: t.BartForSequenceClassification(t.BartConfig(**like_bart)),
        "t5, first version": lambda: t.T5Model(t.T5Config(**like_t5)),
        "torch": lambda: nn.Transformer(8, 2, 1, 1, 12, batch_first=True),
        "bert in a module": lambda: nn.ModuleDict({"net": made["bert, alone"](), "top": nn.Linear(8, 3)}),
    }
    return made[name]() if name in made else MODELS[name]()
