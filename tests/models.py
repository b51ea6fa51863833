"""Base models of the tests: small, offline, three blocks so that late binding shows, the same weights each time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH = 64, 32


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=WIDTH * 3 // 2, num_hidden_layers=3,
        num_attention_heads=4, initializer_range=0.1, max_position_embeddings=48, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=WIDTH * 3 // 2, num_hidden_layers=3,
        num_attention_heads=4, initializer_range=0.1, num_key_value_heads=2, max_position_embeddings=48,
        tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=3, n_head=4, n_positions=48, bos_token_id=1, eos_token_id=2,
        initializer_range=0.1, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        tie_word_embeddings=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


class Attention(nn.Module):
    """Attention that somebody wrote for himself."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            project(x).view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(), nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH * 3 // 2), nn.Linear(WIDTH * 3 // 2, WIDTH)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm(x), attention_mask)
        return x + self.fc2(F.relu(self.fc1(x)))


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, attention_mask)
        return x


class Plain(nn.Module):
    """A model of no library."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.trunk, self.head = nn.Embedding(VOCABULARY, WIDTH), Trunk(), nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.trunk(self.embed(tokens), attention_mask=attention_mask))


@dataclass(frozen=True)
class Model:
    make: Callable[[], nn.Module]

    def __call__(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make().eval()


MODELS = {name: Model(make) for name, make in {"bert": bert, "llama": llama, "gpt2": gpt2, "plain": Plain}.items()}


def tokens(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits
