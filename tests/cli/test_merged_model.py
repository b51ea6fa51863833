"""What ``lightning-peft merge`` leaves: a folder that transformers and its pipelines read as it is."""

import json

import pytest
import torch
from adapter_edits import stir
from torch import nn

import lightning_peft as lp
from lightning_peft.cli.main import main

transformers = pytest.importorskip("transformers")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-peft"])


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", "one", "two", "three", "four"])}
    inner = Tokenizer(models.WordLevel(words, **{"unk_token": "<unk>"}))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    found.chat_template = TEMPLATE
    return found


@pytest.fixture
def base(tmp_path):
    """A folder of a tied bfloat16 model with a tokenizer, a chat template and settings of generation."""
    config = transformers.LlamaConfig(
        vocab_size=7, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(config).bfloat16()
    network.generation_config.repetition_penalty = 1.5
    network.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
    net = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stir(lp.inject(net, lp.LoRA(rank=2)), 0)
    return lp.save_adapter(net, tmp_path / "adapter")


def merge(base, adapter, output, *more):
    model = ["--model", "CausalLM", "--model.model", str(base), "--trainer.accelerator", "cpu", "--peft.method", "LoRA"]
    main(["merge", *model, "--adapter", str(adapter), "--output", str(output), "--seed_everything", "1", *more])


def test_a_module_of_ones_own_is_loaded_as_the_command_says(tmp_path, capsys):
    import safetensors.torch
    from cli_models import Net

    x = torch.randn(4, 6)
    model = lp.inject(Net(), lp.LoRA(rank=2, targets=["net.0"]))
    stir(model, 0)
    adapter, output = lp.save_adapter(model, tmp_path / "adapter"), tmp_path / "merged"
    given = ["--model", "cli_models.Net", "--model.late", "true", "--trainer.accelerator", "cpu"]
    main(["merge", *given, "--adapter", str(adapter), "--output", str(output)])
    printed = capsys.readouterr().out
    loads = f"safetensors.torch.load_model(module, {str(output / 'model.safetensors')!r})"
    assert printed.endswith(f"merged model: {output}\nload it:      {loads}\n")
    module = Net()
    before = module.net(x)
    eval(loads, {"safetensors": safetensors, "module": module})  # noqa: S307
    assert (module.net(x) - before).abs().max() > 1e-3
    torch.testing.assert_close(module.net(x), model.net(x))


@pytest.mark.parametrize("by_file", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_merged_folder_is_read_as_it_is(by_file, base, adapter, tmp_path, capsys):
    output = tmp_path / "merged"
    merge(base, adapter, output, *(["--base", str(base)] if by_file else []))
    assert capsys.readouterr().out.endswith(
        f"merged model: {output}\nload it:      LlamaForCausalLM.from_pretrained({str(output)!r})\n"
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = lp.merge(lp.load_adapter(plain, adapter)).bfloat16()
    merged = transformers.AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert merged.config.tie_word_embeddings
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in merged.state_dict().items())
    assert not torch.equal(merged.state_dict()[KEY], plain_state(base)[KEY])
    assert merged.generation_config.repetition_penalty == 1.5
    names = transformers.AutoTokenizer.from_pretrained(output)
    assert names("two four")["input_ids"] == [4, 6]
    assert names.apply_chat_template([{"role": "user", "content": "one"}], tokenize=False) == "one"
    written = transformers.pipeline("text-generation", model=str(output), max_new_tokens=2, do_sample=False)("one two")
    assert written[0]["generated_text"].startswith("one two")
    assert not list(output.glob("*.index.json"))


KEY = "model.layers.0.self_attn.q_proj.weight"


def plain_state(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base).state_dict()


@pytest.mark.slow
def test_the_type_of_the_base_is_kept_and_a_stale_tie_is_not(base, adapter, tmp_path, monkeypatch):
    from lightning_peft.cli import adapter_tools

    def untied(model, **settings):
        model.network.lm_head.weight = nn.Parameter(2 * model.network.lm_head.weight.detach())
        return lp.merge(model, **settings)

    monkeypatch.setattr(adapter_tools, "merge", untied)
    merge(base, adapter, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert (config["tie_word_embeddings"], config.get("dtype", config.get("torch_dtype"))) == (False, "bfloat16")
    assert torch.equal(merged.lm_head.weight, 2 * merged.model.embed_tokens.weight)


@pytest.mark.slow
def test_adapters_of_nan_are_merged_only_if_it_is_asked(base, adapter, tmp_path):
    net = transformers.AutoModelForCausalLM.from_pretrained(base)
    lp.load_adapter(net, adapter)
    for *_, part in lp.adapters(net):
        nn.init.constant_(part.b, float("nan"))
    lp.save_adapter(net, adapter)
    with pytest.warns(UserWarning, match="holds NaN"), pytest.raises(SystemExit, match="allow_nonfinite=True"):
        merge(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.warns(UserWarning, match="holds NaN"):
        merge(base, adapter, tmp_path / "merged", "--allow_nonfinite", "true")
    assert (tmp_path / "merged/config.json").is_file()
