"""Prefixes and prompts of a Llama as the fewest lines of torch that train them."""

import inspect

import torch
import torch.nn.functional as F
from hand_written import filled
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

LENGTH = 8
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


class Prefix(nn.Module):
    """Trained keys and values before those of each attention layer, given as a cache of earlier tokens."""

    def __init__(self, model: nn.Module, length: int = LENGTH) -> None:
        super().__init__()
        config = model.config
        heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        self.model, self.length = model.requires_grad_(False), length
        self.keys_values = filled(config.num_hidden_layers, 2, 1, heads, length, width)

    def cache(self, rows: int) -> DynamicCache:
        cache, shape = DynamicCache(config=self.model.config), (rows, -1, -1, -1)
        for layer, (key, value) in enumerate(self.keys_values):
            cache.update(key.expand(shape), value.expand(shape), layer)
        return cache

    def forward(self, input_ids: Tensor, **kwargs: object) -> object:
        return self.model(input_ids=input_ids, **{CACHE: self.cache(len(input_ids))}, **kwargs)


class Prompt(nn.Module):
    """Trained embeddings before those of the tokens."""

    def __init__(self, model: nn.Module, length: int = LENGTH) -> None:
        super().__init__()
        self.model, self.prompt = model.requires_grad_(False), filled(length, model.config.hidden_size)

    def embeddings(self) -> Tensor:
        return self.prompt

    def forward(self, input_ids: Tensor, **kwargs: object) -> object:
        embedded = self.model.get_input_embeddings()(input_ids)
        prompt = self.embeddings().expand(len(embedded), -1, -1)
        both = torch.cat([prompt, embedded], 1)
        return self.model(inputs_embeds=both, logits_to_keep=input_ids.shape[1], **kwargs)


class EncodedPrompt(Prompt):
    """The same, computed by a network from other embeddings: P-tuning."""

    def __init__(self, model: nn.Module, length: int = LENGTH) -> None:
        super().__init__(model, length)
        width = self.prompt.shape[1]
        self.lstm = nn.LSTM(width, width // 2, 2, bidirectional=True, batch_first=True)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def embeddings(self) -> Tensor:
        return self.head(self.lstm(self.prompt[None])[0])


class PromptedAttention(nn.Module):
    """Attention of every query to a prompt, with a gate, beside attention to the tokens: LLaMA-Adapter."""

    def __init__(self, base: nn.Module, length: int = LENGTH) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.prompt, self.gate = filled(length, base.config.hidden_size), filled(base.config.num_attention_heads, 1, 1)

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **kwargs: object) -> object:
        output, *rest = self.base(hidden_states=hidden_states, position_embeddings=position_embeddings, **kwargs)
        query = self.heads(self.base.q_proj(hidden_states))
        query, _ = apply_rotary_pos_emb(query, query, *position_embeddings)
        key, value = (self.heads(project(self.prompt[None])) for project in (self.base.k_proj, self.base.v_proj))
        weights = F.softmax(query @ key.mT * self.base.scaling, -1) * self.gate.tanh()
        prompted = (weights @ value).transpose(1, 2).flatten(2)
        return output + self.base.o_proj(prompted), *rest

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.base.head_dim)).transpose(1, 2)
