"""Base models under the stored adapters. They must never change: files were written for exactly these weights."""

import zlib
from collections.abc import Callable

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_peft as lp

VOCABULARY, WIDTH, HEADS, INNER, CLASSES = 32, 16, 2, 32, 3


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(), nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.fc2(F.relu(self.fc1(x)))


class Plain(nn.Module):
    """A transformer of no library."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.trunk = nn.Embedding(VOCABULARY, WIDTH), nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.trunk(self.embed(input_ids)))


class Encoder(nn.Module):
    """torch's own encoder, whose attention reads weights that it never calls, of query, key and value in one."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, 0.0, batch_first=True)
        self.embed, self.trunk = nn.Embedding(VOCABULARY, WIDTH), nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.trunk(self.embed(input_ids)))


class Convolutions(nn.Module):
    """An embedding taken as an image, and two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        image = x.view(len(x), -1, 4, 4).transpose(1, 2)  # (rows, 4, tokens, 4)
        return self.head(self.second(F.relu(self.first(image))).transpose(1, 2).flatten(2))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=2,
        num_attention_heads=HEADS, max_position_embeddings=16, num_labels=CLASSES, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=False,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=HEADS, n_inner=INNER, n_positions=16, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=6, d_ff=INNER, num_layers=2, num_heads=HEADS, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, decoder_start_token_id=0, eos_token_id=2,
        tie_word_embeddings=False, relative_attention_num_buckets=4,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def quantized(kind: str) -> Callable[[], nn.Module]:
    return lambda: lp.quantize(filled(Plain()), kind)


MAKE: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "encoder": Encoder,
    "convolutions": Convolutions,
    "bert": bert,
    "llama": llama,
    "gpt2": gpt2,
    "t5": t5,
    "plain-int8": quantized("int8"),
    "plain-nf4": quantized("nf4"),
}


def build(name: str) -> nn.Module:
    """Return a model of the table, with its fixed weights."""
    model = MAKE[name]()
    return (model if name.startswith("plain-") else filled(model)).eval()


@torch.no_grad()
def filled(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.copy_(values(name, parameter))
    return model


def values(name: str, like: Tensor) -> Tensor:
    """Return values that depend on a name and a shape alone: no random numbers, and none that has to be rounded."""
    index = torch.arange(like.numel())
    scrambled = (31 * index * index + 17 * index + zlib.crc32(name.encode()) % 509) % 509
    offset = 1 if like.ndim == 1 and not name.endswith("bias") else 0  # scales of norms and of adapters
    return (offset + (scrambled - 254).float() / 1024).view(like.shape)


def tokens(with_pseudo: bool = False) -> Tensor:
    rows = torch.tensor([[3, 14, 15, 9, 26, 5], [27, 18, 28, 4, 5, 23]])
    if with_pseudo:
        rows[:, [0, 1, 4]] = -1  # where a template of P-tuning has its pseudo tokens
    return rows


class Task(pl.LightningModule):
    """Trains a model of the table.

    Args:
        name: Its name in the table.
        with_pseudo: Whether rows have pseudo tokens.
    """

    def __init__(self, name: str, with_pseudo: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = build(name)

    def forward(self, input_ids: Tensor) -> Tensor:
        more = {"decoder_input_ids": tokens()[:, :3]} if self.hparams["name"] == "t5" else {}
        output = self.net(input_ids, **more)
        return output if isinstance(output, Tensor) else output.logits

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        out = self(batch).flatten(0, -2)
        loss = F.cross_entropy(out, torch.arange(len(out)) % CLASSES)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)  # Adam would blow up differences in last bits

    def train_dataloader(self) -> DataLoader:
        return DataLoader(tokens(self.hparams["with_pseudo"]), batch_size=2)
