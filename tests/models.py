"""Base models of the tests: small, offline, three blocks so that late binding shows, the same weights each time."""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH = 64, 32
BEFORE_5 = importlib.util.find_spec("transformers") is not None and version("transformers") < "5"


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


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=WIDTH, hidden_dim=WIDTH * 3 // 2, n_layers=3, n_heads=4, initializer_range=0.1,
        max_position_embeddings=48, num_labels=3, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    return DistilBertForSequenceClassification(config)


def t5() -> nn.Module:
    """T5 with gated blocks, whose heads are together not as wide as the model."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=6, d_ff=WIDTH * 3 // 2, num_layers=3, num_decoder_layers=3,
        num_heads=4, feed_forward_proj="gated-gelu", dropout_rate=0.0, initializer_factor=0.3, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=2, tie_word_embeddings=False, relative_attention_num_buckets=8,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_ffn_dim=WIDTH * 3 // 2, decoder_ffn_dim=WIDTH * 3 // 2,
        encoder_layers=3, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4, init_std=0.1,
        max_position_embeddings=48, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH * 3 // 2, num_hidden_layers=3, num_attention_heads=4, image_size=8,
        patch_size=4, initializer_range=0.1, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


def list_of_blocks(model: nn.Module) -> str:
    """Return the name of the list that holds a model's blocks; transformers 5 renamed that of ViT."""
    return next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))


def timm_vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=WIDTH, depth=3, num_heads=4, num_classes=3)
    for parameter in model.parameters():  # which start so small that little depends on the image
        nn.init.normal_(parameter, std=0.15)
    return model


class OneLayer(nn.Module):
    """A layer alone; attention of torch is to itself."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)


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

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.trunk(self.embed(input_ids), attention_mask=attention_mask))


class Encoder(nn.Module):
    """torch's own encoder, without positions."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, WIDTH * 3 // 2, 0.0, batch_first=True)
        self.embed, self.trunk = nn.Embedding(VOCABULARY, WIDTH), nn.TransformerEncoder(layer, 3)
        self.head = nn.Linear(WIDTH, 3)
        for parameter in self.trunk.parameters():  # which all start as copies of one layer
            nn.init.normal_(parameter, std=0.15)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        padding = None if attention_mask is None else attention_mask == 0
        return self.head(self.trunk(self.embed(input_ids), src_key_padding_mask=padding))


class FusedAttention(nn.Module):
    """Attention with one layer for query, key and value, as vision transformers name it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 4, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FusedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), FusedAttention()
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FusedViT(nn.Module):
    """A vision transformer of no library, whose layers are named as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.cls_token = nn.Conv2d(3, WIDTH, 4, 4), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.Sequential(*(FusedBlock() for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1))
        return self.head(self.norm(x)[:, 0])


@dataclass(frozen=True)
class Model:
    make: Callable[[], nn.Module]
    reads: str = "text"  # or: text and text, images
    positions: str = "none"  # absolute (from the first column on), given (position_ids)
    images: str = "pixel_values"  # what forward calls them

    def __call__(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make().eval()

    def inputs(self, padding: str | None = None) -> dict[str, Tensor]:
        """Return arguments of forward: two rows; with padding (left, right), three columns of it and a mask."""
        if self.reads == "images":
            generator = torch.Generator().manual_seed(1)
            return {self.images: torch.randn(2, 3, 8, 8, generator=generator)}
        x, ones = tokens(), torch.ones(2, 7, dtype=torch.long)
        if padding is not None:
            sides = {"left": (3, 0), "right": (0, 3)}[padding]
            x, ones = F.pad(x, sides), F.pad(ones, sides)
        inputs = {"input_ids": x, "attention_mask": ones}
        if padding is not None and self.positions == "given":
            inputs["position_ids"] = (ones.cumsum(1) - 1).clamp(min=0)
        if self.reads == "text and text":
            inputs["decoder_input_ids"] = tokens(length=5)
        return inputs


MODELS = {
    "bert": Model(bert, positions="absolute"),
    "llama": Model(llama, positions="given"),
    "gpt2": Model(gpt2, positions="given"),
    "plain": Model(Plain),
    "distilbert": Model(distilbert, positions="absolute"),
    "t5": Model(t5, "text and text"),
    "bart": Model(bart, "text and text", positions="absolute"),
    "encoder": Model(Encoder),
    "vit": Model(vit, "images"),
    "fused_vit": Model(FusedViT, "images"),
}
if all(map(importlib.util.find_spec, ("timm", "torchvision"))):
    MODELS["timm_vit"] = Model(timm_vit, "images", images="x")


def tokens(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def cache_argument(model: nn.Module) -> str:
    """Return what the installed release of transformers calls the key-value cache that a model takes."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def cache_of(output: Any) -> Any:
    """Return the key-value cache that a model of transformers returned."""
    from transformers import Cache

    (cache,) = (value for value in output.values() if isinstance(value, Cache))
    return cache
