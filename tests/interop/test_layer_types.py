"""Every method on every type of layer, to HF PEFT and from it: the same values there and here, or a refusal."""

import dataclasses
import importlib.util
import warnings

import pytest
import torch
from peft_models import disturbed
from sampling import diagonal
from torch import nn

import lightning_peft as lp

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed"),
    pytest.mark.filterwarnings("ignore"),
]

LAYERS = {
    "linear": (lambda: nn.Linear(8, 12), (4, 8)),
    "narrow": (lambda: nn.Linear(8, 3), (4, 8)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, stride=2, padding=1), (2, 8, 9)),
    "conv1d of one place": (lambda: nn.Conv1d(8, 12, 1), (2, 8, 9)),
    "conv1d, groups": (lambda: nn.Conv1d(8, 12, 3, groups=2), (2, 8, 9)),
    "conv1d, dilated": (lambda: nn.Conv1d(8, 12, 3, padding=2, dilation=2), (2, 8, 9)),
    "conv1d, circular": (lambda: nn.Conv1d(8, 12, 3, padding=1, padding_mode="circular"), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 12, (3, 2), stride=2, padding=1), (2, 8, 7, 7)),
    "conv2d of one place": (lambda: nn.Conv2d(8, 12, 1, dilation=2, padding_mode="reflect"), (2, 8, 7, 7)),
    "conv2d, groups": (lambda: nn.Conv2d(8, 12, 3, groups=2), (2, 8, 7, 7)),
    "conv2d, depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 7, 7)),
    "conv2d, dilated": (lambda: nn.Conv2d(8, 12, 3, padding="same", dilation=2), (2, 8, 7, 7)),
    "conv2d, reflect": (lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), (2, 8, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(8, 12, 2), (2, 8, 4, 4, 4)),
}
GROUPS = ["conv1d, groups", "conv2d, groups", "conv2d, depthwise"]
DILATED = ["conv1d, dilated", "conv2d, dilated"]
PADDED = ["conv1d, circular", "conv2d, reflect"]
CONV1D = [name for name in LAYERS if name.startswith("conv1d")]
OF_ONE_PLACE = ["conv1d of one place", "conv2d of one place"]


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.config = LAYERS[kind][0](), {}

    def forward(self, x):
        return self.layer(x)


def answer(model, kind):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return model.eval()(torch.randn(LAYERS[kind][1], generator=generator))


LORA = {"splits otherwise": GROUPS, "is dilated": DILATED, "pads by": PADDED}
OURS = {  # method, and the layers on which it is refused, by the reason
    "LoRA": (lp.LoRA(rank=3), LORA),
    "DoRA": (lp.LoRA(rank=3, decompose=True), LORA),
    "PiSSA": (lp.LoRA(rank=2, init="pissa"), LORA),
    "IA3 of outputs": (lp.IA3(targets=["layer"], feedforward_targets=[]), {"no Conv1d": CONV1D}),
    "IA3 of inputs": (lp.IA3(targets=[], feedforward_targets=["layer"]), {"no Conv1d": CONV1D}),
    "AdaLoRA": (
        lp.AdaLoRA(initial_rank=3, target_rank=2),
        {"not Conv": [*CONV1D, "conv3d"], "splits otherwise": GROUPS[1:], "pads by": PADDED[1:]},
    ),
    "FedPara": (
        lp.FedPara(rank=1),
        {"no Conv3d": ["conv3d"], "pads by": PADDED, "convolutions of one place have none": OF_ONE_PLACE},
    ),
    "FedPara, flat": (lp.FedPara(rank=3, cores=False), {"no Conv3d": ["conv3d"], "pads by": PADDED}),
    "pFedPara": (
        lp.FedPara(rank=3, cores=False, personalized=True),
        {"no Conv3d": ["conv3d"], "pads by": PADDED},
    ),
    "KronA": (lp.KronA(factor=1), {"no Conv": [*CONV1D, "conv3d"], "pads by": PADDED[1:]}),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", OURS)
def test_what_is_exported_is_the_same_there_and_back_or_refused(name, kind, tmp_path):
    import peft

    method, refused = OURS[name]
    targets = {} if isinstance(method, lp.IA3) else {"targets": ["layer"]}
    model = disturbed(lp.inject(Net(kind), dataclasses.replace(method, **targets)))
    reason = next((text for text, layers in refused.items() if kind in layers), None)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            lp.export_peft(model, tmp_path / "folder")
        assert not (tmp_path / "folder").exists()
        return
    lp.export_peft(model, tmp_path)
    expected = answer(model, kind)
    assert (expected - answer(Net(kind), kind)).abs().max() > 1e-3
    theirs = peft.PeftModel.from_pretrained(Net(kind), tmp_path)
    torch.testing.assert_close(answer(theirs, kind), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(answer(lp.import_peft(Net(kind), tmp_path), kind), expected, atol=1e-5, rtol=0)


THEIRS = {
    "LoRA": ("LoraConfig", {"r": 4}),
    "LoRA of a high rank": ("LoraConfig", {"r": 40, "use_rslora": True}),
    "DoRA": ("LoraConfig", {"r": 4, "use_dora": True}),
    "IA3 of outputs": ("IA3Config", {"feedforward_modules": []}),
    "IA3 of inputs": ("IA3Config", {"feedforward_modules": ["layer"]}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 3, "target_r": 2, "total_step": 10}),
    "AdaLoRA of a high rank": ("AdaLoraConfig", {"init_r": 40, "target_r": 2, "total_step": 10}),
    "LoHa": ("LoHaConfig", {"r": 2, "alpha": 3}),
    "LoHa with cores": ("LoHaConfig", {"r": 2, "use_effective_conv2d": True}),
    "LoHa of a high rank": ("LoHaConfig", {"r": 40, "alpha": 70}),
    "LoHa with large cores": ("LoHaConfig", {"r": 20, "alpha": 70, "use_effective_conv2d": True}),
    "LoKr": ("LoKrConfig", {"r": 2}),
    "LoKr with cores": ("LoKrConfig", {"r": 1, "use_effective_conv2d": True, "decompose_both": True}),
}


@diagonal(("name", "kind"), THEIRS, LAYERS)
def test_what_peft_wrote_is_the_same_here_or_refused(name, kind, tmp_path):
    import peft

    config, settings = THEIRS[name]
    torch.manual_seed(3)
    try:
        theirs = disturbed(peft.get_peft_model(Net(kind), getattr(peft, config)(target_modules=["layer"], **settings)))
        expected = answer(theirs, kind)
    except (ValueError, TypeError, RuntimeError) as error:
        pytest.skip(f"peft itself: {str(error)[:60]}")
    theirs.save_pretrained(tmp_path)
    refused = [*PADDED, *(GROUPS + DILATED if config == "LoraConfig" else [])]
    refused += CONV1D if config == "LoKrConfig" else []
    model = Net(kind)
    if kind in refused and config != "IA3Config":
        with pytest.raises(ValueError, match="of layer cannot be exchanged|on the one-dimensional layer cannot be"):
            lp.import_peft(model, tmp_path)
        assert not list(lp.adapters(model))
        return
    torch.testing.assert_close(answer(lp.import_peft(model, tmp_path), kind), expected, atol=1e-5, rtol=0)
    assert (expected - answer(Net(kind), kind)).abs().max() > 1e-4


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head, self.config = nn.Embedding(11, 8), nn.Linear(8, 5), {}

    def forward(self, ids):
        return self.head(self.table(ids))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_embedding_beside_layers_that_start_from_the_weight_is_the_same_here(init, tmp_path):
    import peft

    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=["table", "head"], r=2, init_lora_weights=init)
    try:
        theirs = disturbed(peft.get_peft_model(Words(), config))
    except (AttributeError, ValueError) as error:
        pytest.skip(f"peft itself: {error}")
    theirs.save_pretrained(tmp_path)
    ids = torch.arange(11)[None]
    with torch.no_grad():
        found, expected = (model.eval()(ids) for model in (lp.import_peft(Words(), tmp_path), theirs))
        assert (expected - Words()(ids)).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attn, self.head, self.config = nn.MultiheadAttention(8, 2), nn.Linear(8, 8), {}

    def forward(self, x):
        return self.head(self.attn(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("targets", [["attn"], ["attn", "head"], ["out_proj", "head"]])
def test_adapters_on_torchs_attention_are_refused(targets, tmp_path):
    """If peft adds the update of out_proj once, the reason is gone and such adapters can be read."""
    import peft

    config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False)
    theirs = peft.get_peft_model(Attention(), config).eval()
    theirs.save_pretrained(tmp_path)
    model = Attention().eval()
    with pytest.raises(ValueError, match=r"on torch's attention attn cannot be exchanged .* adds an update twice"):
        lp.import_peft(model, tmp_path)
    assert not list(lp.adapters(model))
    assert all(p.requires_grad for p in model.parameters())
    if targets != ["attn"]:
        return
    attention = theirs.base_model.model.attn
    layers = attention, attention.base_layer.out_proj
    inside, outside = ((m.lora_B["default"].weight @ m.lora_A["default"].weight) * m.scaling["default"] for m in layers)
    x = torch.randn(3, 2, 8)
    with torch.no_grad(), warnings.catch_warnings():
        model.attn.in_proj_weight += inside
        model.attn.out_proj.weight += 2 * outside
        torch.testing.assert_close(model(x), theirs(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"groups": 2, "dilation": 2}, {"padding": 1, "padding_mode": "circular"}])
def test_convolutions_of_loralib_are_multiplied_out(settings, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 6, 3, **settings))
    groups, rank, alpha = base[0].groups, 2, 5
    a, b = torch.randn(rank * 3, 4 * 3), torch.randn(6 // groups * 3, rank * 3)
    torch.save({"0.lora_A": a, "0.lora_B": b}, tmp_path / "lora.pt")
    x, conv = torch.randn(2, 4, 7, 7), base[0]
    weight = conv.weight + (b @ a).view(conv.weight.shape) * (alpha / rank)  # as loralib's ConvLoRA computes it
    expected = conv._conv_forward(x, weight, conv.bias)
    found = lp.import_loralib(base, tmp_path / "lora.pt", alpha)(x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"whose product is no \(5, \[4, 3, 3\]\)"):
        lp.import_loralib(nn.Sequential(nn.Conv2d(4, 5, 3)), tmp_path / "lora.pt", alpha)
