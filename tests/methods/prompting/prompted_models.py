"""Small models of the architectures that read more than embeddings of text, and how to give them tokens in front."""

import torch
import transformers as t
from models import VOCABULARY, WIDTH

import lightning_peft as lp

IMAGE, LENGTH = 60, 3
FRONT = torch.tensor([5, 7, 9])  # tokens whose embeddings virtual tokens get
_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}
_IMAGES = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
           "image_size": 32, "patch_size": 8}  # fmt: skip
_HALVES = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0,
    "decoder_start_token_id": 1,
}  # fmt: skip


def gemma3n():
    config = t.Gemma3nTextConfig(
        **{**_GROUPED, "intermediate_size": [48, 48]}, sliding_window=32, laurel_rank=8, altup_num_inputs=2,
        layer_types=["sliding_attention", "full_attention"], hidden_size_per_layer_input=8, num_kv_shared_layers=0,
        vocab_size_per_layer_input=VOCABULARY, activation_sparsity_pattern=[0.0, 0.0],
    )  # fmt: skip
    return t.Gemma3nForCausalLM(config)


def llama4():
    config = t.Llama4TextConfig(
        **_GROUPED, num_local_experts=4, num_experts_per_tok=2, intermediate_size_mlp=48, interleave_moe_layer_step=1,
        attention_chunk_size=32,
    )  # fmt: skip
    return t.Llama4ForCausalLM(config)


def qwen2_vl():
    vision = {"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8,
              "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3}  # fmt: skip
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {k: v for k, v in _GROUPED.items() if k != "head_dim"} | {"rope_parameters": rope}
    return t.Qwen2VLForConditionalGeneration(
        t.Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=61,
                        vision_end_token_id=62, video_token_id=63)
    )  # fmt: skip


def gemma3():
    text = {**_GROUPED, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}
    config = t.Gemma3Config(
        text_config=text, vision_config={**_IMAGES, "vision_use_head": False}, image_token_index=IMAGE,
        image_token_id=IMAGE, mm_tokens_per_image=4, boi_token_index=61, eoi_token_index=62,
    )  # fmt: skip
    return t.Gemma3ForConditionalGeneration(config)


def blip2():
    opt = {**_TEXT, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": WIDTH}
    queries = {**_TEXT, "encoder_hidden_size": WIDTH}
    config = t.Blip2Config(vision_config=_IMAGES, qformer_config=queries, text_config=opt, num_query_tokens=4,
                           image_token_index=IMAGE)  # fmt: skip
    return t.Blip2ForConditionalGeneration(config)


MODELS = {
    "albert": lambda: t.AlbertForSequenceClassification(t.AlbertConfig(**_TEXT, embedding_size=16, num_labels=3)),
    "blip2": blip2,
    "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=_TEXT, vision_config=_IMAGES, projection_dim=16)),
    "gemma3": gemma3,
    "gemma3n": gemma3n,
    "llama4": llama4,
    "longformer": lambda: t.LongformerModel(
        t.LongformerConfig(**{**_TEXT, "pad_token_id": 1}, attention_window=[8, 8])
    ),
    "m2m": lambda: t.M2M100ForConditionalGeneration(t.M2M100Config(**_HALVES)),
    "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(**_TEXT, state_size=8, time_step_rank=8)),
    "mamba2": lambda: t.Mamba2ForCausalLM(
        t.Mamba2Config(**_TEXT, state_size=8, num_heads=8, head_dim=8, n_groups=2, expand=2, chunk_size=8)
    ),
    "qwen2_vl": qwen2_vl,
    "rwkv": lambda: t.RwkvForCausalLM(t.RwkvConfig(**_TEXT, attention_hidden_size=WIDTH, context_length=64)),
    "whisper": lambda: t.WhisperForConditionalGeneration(
        t.WhisperConfig(**_HALVES, num_mel_bins=8, max_source_positions=20, max_target_positions=30)
    ),
}  # fmt: skip


def build(name):
    """Return a model with the same random weights each time, large enough to tell tokens apart."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def prompted(name, method=None, virtual=None):
    """Return the model with virtual tokens of these values, by default the embeddings of ``FRONT``."""
    model = lp.inject(build(name), method or lp.PromptTuning(length=LENGTH)).eval()
    ((_, host, _, adapter),) = [found for found in lp.adapters(model) if hasattr(found[3], "prompt")]
    with torch.no_grad():
        adapter.prompt.copy_(host.get_input_embeddings()(FRONT) if virtual is None else virtual)
    return model


def front(value, fill, lead=(0, 0)):
    """Put ``fill`` in front of each row of (batch, n), after as many entries as the row has in ``lead``."""
    fill = torch.as_tensor(fill, dtype=value.dtype).expand(LENGTH)
    return torch.stack([torch.cat([row[:n], fill, row[n:]]) for row, n in zip(value, lead, strict=True)])


def images(name):
    """Return a batch of text around an image of four tokens in each row."""
    row = [11, 61, IMAGE, IMAGE, IMAGE, IMAGE, 62, 12, 13]
    ids = torch.tensor([row, [14, *row[1:7], 15, 16]])
    generator = torch.Generator().manual_seed(2)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "qwen2_vl":
        grids = torch.tensor([[1, 4, 4]] * 2)
        patches = torch.randn(32, 384, generator=generator)
        return call | {"pixel_values": patches, "image_grid_thw": grids, "mm_token_type_ids": (ids == IMAGE).int()}
    call["pixel_values"] = torch.randn(2, 3, 32, 32, generator=generator)
    return call | ({"token_type_ids": (ids == IMAGE).long()} if name == "gemma3" else {})
