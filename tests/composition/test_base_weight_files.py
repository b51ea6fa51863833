"""What folders of base models look like: shards with an index, other names, tied weights, other formats beside them."""

import json
import shutil
import sys

import cli_models
import pytest
import torch
from adapter_edits import stir
from models import MODELS, tokens
from normed import Normed, normed
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from trainer_models import Module, trainer

import lightning_peft as lp
from lightning_peft.checkpoints.safetensors_files import TensorFiles
from lightning_peft.cli.main import main
from lightning_peft.training.distributed.base_weights import start_adapters


def empty(make):
    with lp.without_values():
        return make()


def bits(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def tied():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, tie_word_embeddings=True)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def trained(net, method=None, **kwargs):
    stir(lp.inject(net, method or lp.LoRA(rank=2), **kwargs), 0)
    return net


@pytest.fixture
def base(tmp_path):
    """What transformers writes, in shards, with the weights once more in other formats."""
    MODELS["llama"]().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    names = [path.name for path in (tmp_path / "base").iterdir()]
    assert "model.safetensors.index.json" in names
    assert len(names) > 4
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf"):
        (tmp_path / "base" / name).write_text("stale")
    save_file({"wq": torch.ones(2)}, tmp_path / "base" / "consolidated.safetensors")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    return tmp_path / "base"


def test_a_folder_of_transformers_is_one_again(base, tmp_path):
    from transformers import LlamaForCausalLM

    net = trained(MODELS["llama"]())
    lp.save_adapter(net, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    out = lp.merge_files(empty(MODELS["llama"]), base, tmp_path / "adapter", tmp_path / "out")
    found, expected = LlamaForCausalLM.from_pretrained(out), lp.merge(net).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in found.state_dict().items())
    left = {path.name for path in base.iterdir()} - {path.name for path in out.iterdir()}
    assert left == {"pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "consolidated.safetensors"}
    assert (out / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("outer", [False, True], ids=["network", "module"])
@pytest.mark.parametrize("saved", ["folder", "checkpoint"])
def test_a_module_finds_its_network_in_the_files(outer, saved, base, tmp_path):
    module, method = Module(), lp.LoRA(rank=2)
    runs = trainer(lp.PEFTStrategy(method), max_steps=2)
    runs.fit(module, DataLoader(tokens(4), batch_size=2))
    stir(module, 0)
    adapter = tmp_path / saved
    runs.save_checkpoint(adapter) if saved == "checkpoint" else lp.save_adapter(module, adapter)
    out = lp.merge_files(empty(Module if outer else MODELS["llama"]), base, adapter, tmp_path / "out")
    expected = lp.merge(module).net.state_dict()
    found = bits(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in found.items())


def test_a_trunk_finds_its_weights_below_another_name(base, tmp_path):
    net = trained(MODELS["llama"]().model)
    lp.save_adapter(net, tmp_path / "adapter")
    found = bits(lp.merge_files(empty(lambda: MODELS["llama"]().model), base, tmp_path / "adapter", tmp_path / "out"))
    expected = lp.merge(net).state_dict()
    assert all(torch.equal(found[f"model.{k}"], v) for k, v in expected.items())
    assert torch.equal(found["lm_head.weight"], MODELS["llama"]().lm_head.weight)


@pytest.mark.parametrize(
    "there", [["lm_head.weight"], ["model.embed_tokens.weight"], []], ids=["embed", "head", "both"]
)
def test_tied_weights_may_be_there_under_any_name(there, tmp_path):
    state = {k: v.clone() for k, v in tied().state_dict().items() if k not in there}
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base" / "model.safetensors")
    net = trained(tied(), also_train=["lm_head"])
    nn.init.normal_(net.lm_head.weight)
    lp.save_adapter(net, tmp_path / "adapter")
    found = bits(lp.merge_files(empty(tied), tmp_path / "base", tmp_path / "adapter", tmp_path / "out"))
    expected = lp.merge(net).state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(v, expected[k]) for k, v in found.items())


def test_a_narrow_base_is_rounded_once(tmp_path):
    state = {k: v.bfloat16() for k, v in MODELS["llama"]().state_dict().items()}
    save_file(state, tmp_path / "base.safetensors")
    net = MODELS["llama"]()
    net.load_state_dict(state)  # trained in float32 on what the files hold
    lp.save_adapter(trained(net), tmp_path / "adapter")
    out = lp.merge_files(empty(MODELS["llama"]), tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out")
    found, expected = load_file(out / "base.safetensors"), lp.merge(net).state_dict()
    assert all(v.dtype == torch.bfloat16 and torch.equal(v, expected[k].bfloat16()) for k, v in found.items())


def test_what_the_files_have_no_room_for_is_refused(tmp_path):
    net = trained(MODELS["llama"](), lp.BitFit(add_missing=True))
    lp.save_adapter(net, tmp_path / "biases")
    (tmp_path / "base").mkdir()
    save_file(MODELS["llama"]().state_dict(), tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match="q_proj gets a bias, for which its files have no room"):
        lp.merge_files(empty(MODELS["llama"]), tmp_path / "base", tmp_path / "biases", tmp_path / "out")
    headed = trained(MODELS["bert"](), also_train=["classifier"])
    lp.save_adapter(headed, tmp_path / "headed")
    (tmp_path / "trunk").mkdir()
    save_file(MODELS["bert"]().bert.state_dict(), tmp_path / "trunk" / "model.safetensors")
    with pytest.raises(ValueError, match="lacks classifier.weight; .* where a new head was trained, merge into"):
        lp.merge_files(empty(MODELS["bert"]), tmp_path / "trunk", tmp_path / "headed", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_are_not_whole_or_not_clear_are_refused(base, tmp_path):
    index = base / "model.safetensors.index.json"
    first = next(base.glob("model-*.safetensors"))
    first.rename(tmp_path / first.name)
    with pytest.raises(FileNotFoundError, match=f"{first.name} is missing, which model.safetensors.index.json names"):
        TensorFiles(base)
    index.write_text("[]")
    with pytest.raises(ValueError, match="is damaged, or no index"):
        TensorFiles(base)
    index.unlink()
    save_file(load_file(tmp_path / first.name), base / "again.safetensors")
    (tmp_path / first.name).rename(first)
    with pytest.raises(ValueError, match="is in again.safetensors, too; give the file that is meant"):
        TensorFiles(base)
    for path in base.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no .safetensors file, but pytorch_model.bin: load it in transformers"):
        TensorFiles(base)


@pytest.mark.parametrize("name", ["../outside.safetensors", "{folder}/outside.safetensors", "..", "a\\b", "inner/a"])
def test_an_index_names_no_files_of_other_folders(name, base, tmp_path):
    name = name.format(folder=tmp_path)
    lp.save_adapter(trained(MODELS["llama"]()), tmp_path / "adapter")
    first = next(base.glob("model-*.safetensors"))
    shutil.copy(first, tmp_path / "outside.safetensors")
    index = base / "model.safetensors.index.json"
    named = json.loads(index.read_text())
    named["weight_map"] = {k: name if v == first.name else v for k, v in named["weight_map"].items()}
    index.write_text(json.dumps(named))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"index.json names '.*', which is no file beside it"):
        lp.merge_files(empty(MODELS["llama"]), base, tmp_path / "adapter", tmp_path / "out")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda header, data: (header, data + b"x"), "followed by bytes of no tensor"),
        (lambda header, data: (header, data[:-4]), "cut short"),
        (lambda header, data: ({**header, "a": header["b"]}, data), "begins at byte"),
        (
            lambda header, data: ({**header, "b": {**header["b"], "shape": [3]}}, data),
            "no type, shape and place that fit",
        ),
        (lambda header, data: ({**header, "b": {**header["b"], "dtype": "F13"}}, data), "which cannot be read here"),
    ],
)
def test_files_whose_header_does_not_fit_them_are_refused(edit, said, tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(4)}, path := tmp_path / "x.safetensors")
    content = path.read_bytes()
    stop = 8 + int.from_bytes(content[:8], "little")
    header, data = edit(json.loads(content[8:stop]), content[stop:])
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(ValueError, match=said):
        TensorFiles(path)


def test_checkpoints_that_hold_no_adapter_are_refused(base, tmp_path):
    module = Module()
    runs = trainer(lp.PEFTStrategy(lp.LoRA(rank=2), full_checkpoint=True), max_steps=1)
    runs.fit(module, DataLoader(tokens(4), batch_size=2))
    runs.save_checkpoint(tmp_path / "full.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": Module()}, tmp_path / "pickled.ckpt")
    for name, said in (("full", "holds no adapter of lightning_peft"), ("text", "no checkpoint that can be read"),
                       ("pickled", "no checkpoint that can be read")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            lp.merge_files(empty(Module), base, tmp_path / f"{name}.ckpt", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="is no adapter folder"):
        lp.merge_files(empty(Module), base, tmp_path / "nothing.ckpt", tmp_path / "out")


def test_statistics_of_an_adapter_are_written_and_the_model_is_left_as_it_was(tmp_path):
    net = normed()
    lp.save_adapter(net, tmp_path / "adapter")
    save_file(plain().state_dict(), tmp_path / "base.safetensors")
    bare = empty(Normed)
    buffers = {name: buffer.clone() for name, buffer in bare.named_buffers()}
    out = lp.merge_files(bare, tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out")
    found, expected = load_file(out / "base.safetensors"), lp.merge(net).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in found.items())
    assert found["norm.running_mean"].tolist() == [1.0] * 6
    assert all(torch.equal(v, buffers[k]) for k, v in bare.named_buffers())
    save_file({k: v for k, v in plain().state_dict().items() if "running" not in k}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="norm gets a running_mean, for which its files have no room"):
        lp.merge_files(bare, tmp_path / "less.safetensors", tmp_path / "adapter", tmp_path / "other")
    assert all(torch.equal(v, buffers[k]) for k, v in bare.named_buffers())


def plain():
    return lp.detach(normed())


@pytest.mark.slow
def test_the_command_merges_files(tmp_path, monkeypatch):
    module = cli_models.Net()
    method = lp.LoRA(rank=2, targets=["net.0", "net.2"])
    trained(module, method, also_train=["net.4"])
    nn.init.normal_(module.net[4].weight)
    lp.save_adapter(module, tmp_path / "adapter")
    save_file(cli_models.network().state_dict(), tmp_path / "base.safetensors")
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    seen = []
    build = cli_models.network
    monkeypatch.setattr(cli_models, "network", lambda: seen.append(build()) or seen[-1])
    for late in ("false", "true"):
        out = tmp_path / late
        arguments = ["--model", "cli_models.Net", "--model.late", late, "--seed_everything", "1"]
        arguments += ["--trainer.accelerator", "cpu", "--peft.method", "LoRA", "--adapter", str(tmp_path / "adapter")]
        main(["merge", *arguments, "--base", str(tmp_path / "base.safetensors"), "--output", str(out)])
        found, expected = (
            load_file(out / "base.safetensors"),
            lp.merge(lp.load_adapter(cli_models.Net(), tmp_path / "adapter")),
        )
        assert all(torch.equal(v, expected.net.state_dict()[k]) for k, v in found.items())
    assert sum(all(p.is_meta for p in net.parameters()) for net in seen) == 2
    with pytest.raises(SystemExit, match="give a folder that does not"):
        main(["merge", *arguments, "--base", str(tmp_path / "base.safetensors"), "--output", str(out)])


def test_what_starts_from_weights_waits_for_values_and_does_not_start_without():
    computed, copied = "are? computed from the host's weight", "start from those of the base"
    from_weight = (lp.LoRA(rank=2, decompose=True), lp.LoRA(rank=2, init="pissa"))
    for method, reason in (*((m, computed) for m in from_weight), (lp.TrainableTokens(tokens=[3]), copied)):
        net = lp.inject(empty(MODELS["llama"]), method)
        assert all(p.is_meta for p in net.parameters())
        with pytest.raises(TypeError, match=f"{reason}: load the base model first, then inject"):
            start_adapters(net, torch.device("cpu"))
