"""Real adapter files, where they lie beside the repository, and what authors' own code would write."""

import pytest
import torch
from models import MODELS, logits
from torch import nn

import lightning_peft as lp


@pytest.fixture
def files(shared):
    return shared / "models/adapters-interop"


class Dense(nn.Module):
    """The base of peft's own regression files, whose weights are drawn from seed 0."""

    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 2)

    def forward(self, x):
        return self.lin1(self.lin0(x.float()).relu()).log_softmax(-1)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.emb, self.conv1d, self.lin0 = nn.Embedding(100, 5), Conv1D(1, 5), nn.Linear(10, 2)

    def forward(self, x):
        return self.lin0(self.conv1d(self.emb(x)).relu().flatten(1)).log_softmax(-1)


class Picture(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv2d, self.lin0 = nn.Conv2d(5, 10, 3), nn.Linear(10, 2)

    def forward(self, x):
        return self.lin0(self.conv2d(x.float().reshape(2, 5, 3, 3)).relu().flatten(1)).log_softmax(-1)


OLD = {
    "lora_mlp": Dense,
    "lora_mlp_modules_to_save": Dense,
    "ia3_mlp": Dense,
    "ia3_no_ff_mlp": Dense,
    "adalora_mlp": Dense,
    "lora_emb_conv1d": Table,
    "lora_conv2d": Picture,
    "ia3_conv2d": Picture,
}


@pytest.mark.parametrize("name", OLD)
def test_files_of_an_old_peft_give_the_outputs_stored_with_them(name, files):
    folder = files / "peft" / name / "0.6.1"
    torch.manual_seed(0)
    model = lp.import_peft(OLD[name](), folder).eval()
    y = model(torch.arange(90).view(9, 10))
    if not (folder / "output.pt").is_file():
        assert y.isfinite().all()
        return
    stored = torch.load(folder / "output.pt", map_location="cpu", weights_only=True)
    print(f"{name}: largest difference to the stored output {(y - stored).abs().max():.1e}")
    torch.testing.assert_close(y, stored, atol=1e-4, rtol=1e-4)


def placed(model):
    return [value for *_, adapter in lp.adapters(model) for value in adapter.state_dict().values()]


@pytest.mark.parametrize(("name", "count"), [("lora_opt-350m", 96), ("ia3_opt-350m", 72)])
def test_files_for_opt_have_a_place_for_each_tensor(name, count, files):
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=8, hidden_size=1024, ffn_dim=4096, num_hidden_layers=24, num_attention_heads=16,
        word_embed_proj_dim=512, max_position_embeddings=8, do_layer_norm_before=False,
    )  # fmt: skip
    with torch.device("meta"):  # of which nothing is computed
        model = OPTForCausalLM(config)
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is not None:  # one value, seen everywhere: 1.3 GB less
                value = torch.zeros(()).expand(parameter.shape)
                module._parameters[key] = nn.Parameter(value, requires_grad=False)
    lp.import_peft(model, files / "peft" / name / "0.6.1")
    tensors = placed(model)
    print(f"{name}: {len(tensors)} tensors, {sum(t.numel() for t in tensors):,} values")
    assert len(tensors) == count
    assert all(tensor.count_nonzero() for tensor in tensors)


def test_the_roberta_of_loralib_has_a_place_for_each_tensor(files):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(vocab_size=8, intermediate_size=8, max_position_embeddings=8, num_labels=3)
    model = RobertaForSequenceClassification(config)
    path = files / "loralib/roberta_base_lora_mnli.bin"
    lp.import_loralib(model, path, alpha=16)
    stored, state = torch.load(path, map_location="cpu", weights_only=True), model.state_dict()
    for key, value in stored.items():
        host, _, tensor = key.rpartition(".")
        copied = {"lora_A": "peft.lora.a", "lora_B": "peft.lora.b"}.get(tensor, f"peft.lora_own.own.{tensor}")
        assert torch.equal(state[f"{host}.{copied}"], value), key  # the base keeps a head of its own
    adapter = model.roberta.encoder.layer[0].attention.self.query.peft["lora"]
    assert adapter.scale == 2
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(stored) == 52
    print(f"loralib: {len(stored)} tensors, {sum(value.numel() for value in stored.values()):,} values")


def test_the_t0_of_t_few_has_a_place_for_each_tensor(files):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=8, d_model=4, d_kv=64, num_heads=32, d_ff=5120, num_layers=24, num_decoder_layers=24,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    path = files / "t-few/t03b_ia3_finish.pt"
    lp.import_t_few(model, path)
    stored, state = torch.load(path, map_location="cpu", weights_only=True), model.state_dict()
    for key, value in stored.items():
        assert torch.equal(state[key.replace("multi_lora_b", "peft.ia3.scales")], value.flatten()), key
    assert len(placed(model)) == len(stored) == 192
    assert sum(value.numel() for value in stored.values()) == 540_672
    print("T-Few: 192 tensors, 540,672 values")


def test_factors_of_fused_layers_go_to_the_rows_that_were_adapted(tmp_path):
    generator = torch.Generator().manual_seed(1)
    stored = {
        f"transformer.h.{n}.attn.c_attn.{key}": torch.randn(shape, generator=generator) * 0.1
        for n in range(3)
        for key, shape in (("lora_A", (8, 32)), ("lora_B", (64, 4)))
    }
    torch.save(stored, tmp_path / "lora.pt")
    model = lp.import_loralib(MODELS["gpt2"](), tmp_path / "lora.pt", alpha=32)
    base = MODELS["gpt2"]()
    for n, block in enumerate(base.transformer.h):
        a, b = (stored[f"transformer.h.{n}.attn.c_attn.{key}"] for key in ("lora_A", "lora_B"))
        with torch.no_grad():  # loralib's own: 32 / 4 times each part's product, zeros for the key
            block.attn.c_attn.weight[:, :32] += 8 * (b[:32] @ a[:4]).T
            block.attn.c_attn.weight[:, 64:] += 8 * (b[32:] @ a[4:]).T
    inputs = MODELS["gpt2"].inputs()
    torch.testing.assert_close(logits(model(**inputs)), logits(base(**inputs)))
    with pytest.raises(ValueError, match="factors of 2 parts, but parts=.'query'."):
        lp.import_loralib(MODELS["gpt2"](), tmp_path / "lora.pt", alpha=32, parts=["query"])
    with pytest.raises(ValueError, match="which the model has not"):
        lp.import_loralib(MODELS["bert"](), tmp_path / "lora.pt", alpha=32)
    with pytest.raises(ValueError, match="No key ends in multi_lora_b"):
        lp.import_t_few(MODELS["gpt2"](), tmp_path / "lora.pt")


class Grouped(nn.Module):
    """One fused layer with fewer keys than queries, and a plain one."""

    def __init__(self, fused):
        super().__init__()
        torch.manual_seed(0)
        self.attn = nn.Module()
        self.attn.proj = nn.Linear(8, 8)
        self.attn.add_module(fused, nn.Linear(8, 16))
        self.fused = fused

    def forward(self, x):
        return self.attn.proj(x) @ self.attn.get_submodule(self.fused)(x).mT[:, :8]


@pytest.mark.parametrize("parts", [["query"], ["value"], ["query", "value"], ["query", "key", "value"]])
def test_factors_of_litgpt_go_to_the_rows_of_grouped_heads(parts, tmp_path):
    rows = {"query": (0, 8), "key": (8, 12), "value": (12, 16)}
    count, out = len(parts), sum(rows[part][1] - rows[part][0] for part in parts)
    a, b, c, d = torch.randn(2 * count, 8), torch.randn(out, 2), torch.randn(3, 8), torch.randn(8, 3)
    for fused in ("qkv", "attn"):
        names = {f"attn.{fused}.lora_A": a, f"attn.{fused}.lora_B": b, "attn.proj.lora_A": c, "attn.proj.lora_B": d}
        torch.save({"model": names}, tmp_path / f"{fused}.pth")
    model, base = lp.import_loralib(Grouped("qkv"), tmp_path / "qkv.pth", alpha=6, parts=parts), Grouped("qkv")
    with torch.no_grad():
        base.attn.proj.weight += 2 * d @ c
        start = 0
        for n, part in enumerate(parts):
            first, stop = rows[part]
            base.attn.qkv.weight[first:stop] += 3 * b[start : start + stop - first] @ a[2 * n : 2 * n + 2]
            start += stop - first
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(model(x), base(x), atol=1e-3, rtol=1e-5)
    with pytest.raises(ValueError, match="whose order among its rows is not known"):
        lp.import_loralib(Grouped("attn"), tmp_path / "attn.pth", alpha=6, parts=parts)
