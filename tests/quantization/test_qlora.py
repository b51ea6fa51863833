"""PEFTStrategy over a quantized base: fit, checkpoint, resume, reload, merge."""

import gzip

import lightning.pytorch as pl
import models
import pytest
import torch
from installed import needs
from lightning.pytorch.callbacks import ModelCheckpoint
from sampling import diagonal
from torch.utils.data import DataLoader
from trainer_models import Module, data, module, trainer

import lightning_peft as lp
from lightning_peft.core.fingerprint import fingerprint
from lightning_peft.quantization.quantize import quantized_layers

pytestmark = [
    needs("bitsandbytes", "torchao"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.fixture(params=[32, 128], ids=["torchao", "bitsandbytes"])
def width(request, monkeypatch):
    monkeypatch.setattr(models, "WIDTH", request.param)


def strategy(quantize="nf4", rank=4):
    return lp.PEFTStrategy(lp.LoRA(rank=rank, targets=["all-linear"]), quantize=quantize, show_summary=False)


def fit(quantize, epochs, *callbacks, path=None, place="init", net=None):
    pl.seed_everything(7, verbose=False)
    net = net or module("llama", place)
    trainer(strategy(quantize), *callbacks, epochs=epochs).fit(net, data(shuffle=True), ckpt_path=path)
    return net


@pytest.mark.slow
@diagonal(("place", "quantize"), ["init", "configure_model"], ["nf4", "int8"])
def test_resuming_ends_with_the_same_weights(width, quantize, place, tmp_path):
    whole = fit(quantize, 2)
    fit(quantize, 1, ModelCheckpoint(tmp_path, save_last=True))
    resumed = fit(quantize, 2, path=tmp_path / "last.ckpt", place=place)
    assert len(quantized_layers(resumed)) == 3 * 7
    expected, found = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys()
    assert all(".peft.lora." in key for key in expected)
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert fingerprint(resumed) == fingerprint(lp.inject(Module("llama"), lp.LoRA()))


def test_resuming_over_other_bits_is_refused(tmp_path):
    fit("int8", 1, ModelCheckpoint(tmp_path, save_last=True))
    with pytest.raises(ValueError, match="trained with quantize='int8', this run has None"):
        fit(None, 2, path=tmp_path / "last.ckpt")


def test_what_trains_is_wide_and_the_base_stays(width):
    net = module("llama")
    before = {n: p.detach().clone() for n, p in lp.quantize(module("llama"), "nf4").named_parameters()}
    fit("nf4", 1, net=net)
    assert isinstance(net.net.lm_head, torch.nn.Linear)
    assert net.net.lm_head.weight.dtype == net.net.model.norm.weight.dtype == torch.float32
    for name, parameter in net.named_parameters():
        if ".peft." in name:
            assert parameter.dtype == torch.float32
        else:
            assert torch.equal(parameter, before[name])


def test_an_adapter_goes_to_either_base_and_is_merged_into_either(width, tmp_path, capsys):
    net = fit("nf4", 1).eval()
    x = data().dataset
    with torch.no_grad():
        y = net.net(x).logits
        lp.save_adapter(net, tmp_path)
        again = lp.load_adapter(lp.quantize(module("llama"), "nf4"), tmp_path).eval()
        torch.testing.assert_close(again.net(x).logits, y)
        with pytest.raises(TypeError, match="is quantized.*before quantization.*dequantize=True"):
            lp.merge(again)
        torch.testing.assert_close(lp.merge(again, dequantize=True).net(x).logits, y, atol=1e-4, rtol=1e-4)
        said = capsys.readouterr().out
        assert 5 < float(said.split("by ")[1].split(" %")[0]) < 12
        original = lp.merge(lp.load_adapter(module("llama"), tmp_path)).eval()
        difference = (original.net(x).logits - y).abs().max()
        assert 0 < difference < 0.5 * y.abs().max()
    assert not quantized_layers(again)


def test_bits_that_cannot_train_are_refused():
    net = lp.quantize(module("llama"), "int8")
    with pytest.raises(TypeError, match=r"_proj.weight is stored in few bits and cannot train"):
        lp.inject(net, lp.LastLayers(count=1))
    assert not any(True for _ in lp.adapters(net))


@pytest.mark.parametrize("method", [
    lp.LoRA(targets=["all-linear"], rank=2, decompose=True),
    lp.LoRA(targets=["all-linear"], rank=2, init="pissa"),
    lp.AdaLoRA(initial_rank=3, target_rank=2),
], ids=["dora", "pissa", "adalora"])  # fmt: skip
def test_every_weight_method_works_on_top(width, method):
    net = lp.quantize(module("llama"), "nf4")
    x = data().dataset
    with torch.no_grad():
        base = net.net(x).logits
    lp.inject(net, method)
    with torch.no_grad():
        torch.testing.assert_close(net.net(x).logits, base, atol=1e-4, rtol=1e-4)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(net.net(x).logits.flatten(0, -2), x.flatten() % 3)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05


class Story(pl.LightningModule):
    def __init__(self, folder):
        super().__init__()
        from transformers import AutoModelForCausalLM

        self.save_hyperparameters()
        self.net = AutoModelForCausalLM.from_pretrained(folder)

    def training_step(self, batch, index):
        loss = self.net(batch, labels=batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.slow
def test_qlora_of_a_really_trained_model(shared, tmp_path):
    """Fits, checkpoints, resumes bit for bit and reloads; the base takes 4.1 bits for each value."""
    from transformers import AutoTokenizer

    folder = str(shared / "models" / "tinystories-656k")
    text = gzip.decompress((shared / "data" / "tinyshakespeare" / "input.txt.gz").read_bytes()).decode()[:40_000]
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
    rows = ids[: len(ids) // 64 * 64].view(-1, 64)[:96]

    def run(epochs, *callbacks, path=None):
        pl.seed_everything(1, verbose=False)
        story = Story(folder)
        loader = DataLoader(rows, batch_size=8, shuffle=True)
        trainer(strategy(rank=8), *callbacks, epochs=epochs).fit(story, loader, ckpt_path=path)
        return story

    whole = run(2)
    run(1, ModelCheckpoint(tmp_path, save_last=True))
    resumed = run(2, path=tmp_path / "last.ckpt")
    expected, found = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected | found)
    fresh = lp.load_from_checkpoint(Story, tmp_path / "last.ckpt")
    assert not quantized_layers(fresh)
    with torch.no_grad():
        losses = {name: story.eval().net(rows, labels=rows).loss.item() for name, story in (
            ("before", lp.quantize(Story(folder), "nf4")), ("after", whole))}  # fmt: skip
    print(losses)
    assert losses["after"] < losses["before"] - 0.3
    layers = quantized_layers(whole)
    values = sum(layer.in_features * layer.out_features for layer in layers)
    stored = sum(t.nbytes for layer in layers for k, t in layer.state_dict().items() if _counts(k))
    print(f"{len(layers)} layers, {values:,} values, {8 * stored / values:.4f} bits for each")
    assert 8 * stored / values == pytest.approx(4.13, abs=0.02)


def _counts(key):
    """Codes and statistics; the codebooks are the same few bytes for a layer of any size."""
    return (
        key.startswith(("weight", "codes8", "factor", "mean")) and "quant_map" not in key and "quant_state" not in key
    )
