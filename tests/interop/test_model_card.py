"""The card beside an exported adapter, against counted values; and what vLLM takes of a folder."""

import importlib.util
import json
import math
import re

import pytest
import torch
from models import MODELS, logits
from peft_models import adapted, disturbed
from safetensors.torch import load_file
from torch import nn

import lightning_peft as lp

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:peft.*")


def exported(folder, method=None, name="llama", also_train=(), **settings):
    model = adapted(name, method or lp.LoRA(rank=4, alpha=6), also_train)
    lp.export_peft(model, folder, **settings)
    return model, (folder / "README.md").read_text()


def rows(text, title):
    """Return the cells of the table below a title."""
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines[2:]}


def test_the_card_says_what_was_trained_and_how_much(tmp_path):
    method = lp.LoRA(rank=4, alpha=6, targets=["query", "value"], rank_pattern={"*2.*": 7})
    model, text = exported(
        tmp_path, method, "bert", ["classifier"], metrics={"accuracy": 0.9125, "loss": torch.tensor(2)}
    )
    adapters = 2 * 2 * 4 * (32 + 32) + 2 * 7 * (32 + 32)
    head, total = 32 * 3 + 3, sum(p.numel() for p in model.parameters())
    assert adapters + head == sum(p.numel() for p in model.parameters() if p.requires_grad)
    table = rows(text, "Parameters")
    assert table["LoRA (lora)"] == ["6", f"{adapters:,}"]
    assert table["base parameters"] == ["2", "99"]
    share = 100 * (adapters + head) / total
    assert table["all of these"] == ["", f"{adapters + head:,} of {total:,} ({share:.3g} %)"]
    assert f"takes {(tmp_path / 'adapter_model.safetensors').stat().st_size:,} bytes" in text
    assert sum(v.numel() for v in load_file(tmp_path / "adapter_model.safetensors").values()) == adapters + head
    settings = {key: json.loads(value) for key, (value,) in rows(text, "Method").items()}
    assert settings["rank_pattern"] == {"*2.*": 7}
    assert {key: lp.LoRA(**settings).__dict__[key] for key in settings} == settings
    assert rows(text, "Metrics") == {"accuracy": ["0.9125"], "loss": ["2"]}
    assert 'BertForSequenceClassification.from_pretrained("path/to/base", num_labels=3)' in text


def test_the_fingerprint_is_that_of_the_base(tmp_path):
    model, text = exported(tmp_path / "peft", lp.LoRA(rank=2), "bert", ["classifier"])
    lp.save_adapter(model, tmp_path / "ours")
    base = json.loads((tmp_path / "ours/adapter_config.json").read_text())["base"]
    assert f"of fingerprint `{base}`" in text


def test_of_several_methods_the_exported_one_is_counted(tmp_path):
    model = disturbed(
        lp.inject(MODELS["bert"](), [lp.LoRA(rank=2), lp.IA3(targets=[], feedforward_targets=["feedforward.down"])])
    )
    lp.export_peft(model, tmp_path, name="ia3")
    table = rows((tmp_path / "README.md").read_text(), "Parameters")
    assert [name for name in table if name.startswith(("LoRA", "IA3"))] == ["IA3 (ia3)"]
    assert table["all of these"][1].startswith(f"{3 * 48} of ")


@pytest.mark.parametrize(
    ("name", "pipeline", "method"),
    [("llama", "text-generation", "LoRA"), ("bert", "text-classification", "IA3"), ("t5", None, "LoRA")],
)
def test_the_hub_reads_the_front_matter(name, pipeline, method, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    model = lp.inject(MODELS[name](), getattr(lp, method)())
    model.config.name_or_path = "somebody/small-model"
    lp.export_peft(model, tmp_path)
    card = hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "somebody/small-model"
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == pipeline
    assert card.data.license is None
    assert card.data.tags == ["lightning-peft", method.lower(), "base_model:adapter:somebody/small-model"]
    assert card.text.startswith(f"\n# {method} for somebody/small-model\n") or card.text.lstrip().startswith("# ")


def test_a_folder_of_ones_own_machine_is_not_named_as_the_base(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    for place in (str(tmp_path), "./models/mine", "~/mine", ""):
        model = lp.inject(MODELS["llama"](), lp.LoRA(rank=2))
        model.config.name_or_path = place
        lp.export_peft(model, tmp_path / "adapter")
        card = hub.ModelCard.load(tmp_path / "adapter/README.md")
        assert card.data.base_model is None
        assert not place or place not in card.content


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.filterwarnings("ignore")
def test_the_code_in_the_card_loads_the_adapter(tmp_path):
    model, text = exported(tmp_path / "adapter")
    MODELS["llama"]().save_pretrained(tmp_path / "base")
    load, ours, theirs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    load = load.replace("path/to/base", str(tmp_path / "base"))
    load = load.replace("path/to/this/folder", str(tmp_path / "adapter"))
    expected = logits(model(**MODELS["llama"].inputs()))
    for code in (ours, theirs):
        scope = {}
        exec(load + code, scope)  # noqa: S102
        answer = logits(scope["model"].eval()(**MODELS["llama"].inputs()))
        assert (answer - expected).abs().max() < 1e-5


def test_a_readme_of_somebody_else_stays(tmp_path):
    (tmp_path / "README.md").write_text("# My notes\n")
    model = adapted("llama", lp.LoRA(rank=2))
    with pytest.raises(FileExistsError, match=r"README\.md was written or edited .* pass model_card=False"):
        lp.export_peft(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    lp.export_peft(model, tmp_path, model_card=False)
    assert (tmp_path / "README.md").read_text() == "# My notes\n"
    assert lp.vllm_problems(tmp_path) == []


def test_our_own_card_is_replaced_unless_it_was_edited(tmp_path):
    _, first = exported(tmp_path, lp.LoRA(rank=2))
    _, second = exported(tmp_path, lp.LoRA(rank=3))
    assert first != second
    (tmp_path / "README.md").write_text(second.replace("## Loading", "It speaks like Shakespeare.\n\n## Loading"))
    with pytest.raises(FileExistsError, match="would be lost"):
        exported(tmp_path, lp.LoRA(rank=2))


def test_a_metric_is_a_number(tmp_path):
    with pytest.raises(TypeError, match=r"metrics\['accuracy'\] must be a number, got 'good'"):
        exported(tmp_path, metrics={"accuracy": "good"})
    assert not list(tmp_path.iterdir())


RANK = r"Start its server with --max-lora-rank 32: rank "
PATTERN = r"vLLM 0\.33\.0 reads rank_pattern; versions that do not read"
VLLM = {  # a name of MODELS, a method, what trains beside it; how each sentence starts
    "plain": ("llama", lp.LoRA(rank=16), [], []),
    "rooted": ("llama", lp.LoRA(rank=4, scaling="rank_stabilized"), [], []),
    "start": ("llama", lp.LoRA(rank=2, init="pissa"), [], []),
    "embeddings": ("llama", lp.LoRA(rank=2, targets=["embed_tokens", "lm_head"]), [], []),
    "wide": ("bert", lp.LoRA(rank=20), [], [RANK + "20 is above its default of 16; it takes 1, 8, 16, 32,"]),
    "patterns": ("bert", lp.LoRA(rank=4, rank_pattern={"*2.*": 17}), [], [RANK + "17 ", PATTERN]),
    "head": ("bert", lp.LoRA(rank=4), ["classifier"], [r"Start its server with --max-lora-cls-labels 3"]),
    "module": ("llama", lp.LoRA(rank=4), ["lm_head"], [r"Of whole modules .* one head, named .* not lm_head\."]),
    "dora": ("bert", lp.LoRA(rank=20, decompose=True), [], [r"vLLM refuses DoRA \(use_dora\)\.$"]),
    "biases": ("bert", [lp.LoRA(rank=4), lp.BitFit()], [], [r"vLLM refuses biases that train \(bias='all'\)\."]),
    "gpt2": ("gpt2", lp.LoRA(rank=4), [], [r"The base has transposed weights as GPT-2"]),
    "tables": ("bert", lp.LoRA(rank=4, targets=["word_embeddings"]), [], [r".*, wte alone, not word_embeddings"]),
    "ia3": ("llama", lp.IA3(), [], [r"vLLM loads LoRA alone, and this is IA3\."]),
    "adalora": ("bert", lp.AdaLoRA(initial_rank=3, target_rank=2), [], [r"vLLM loads LoRA alone, .* ADALORA\."]),
    "prompts": ("llama", lp.PromptTuning(length=2), [], [r"vLLM loads LoRA alone, and this is PROMPT_TUNING\."]),
}  # fmt: skip


@pytest.mark.parametrize("kind", VLLM)
def test_what_vllm_does_not_take_is_said_in_the_card_too(kind, tmp_path):
    name, method, also_train, said = VLLM[kind]
    lp.export_peft(lp.inject(MODELS[name](), method, also_train), tmp_path)
    found, text = lp.vllm_problems(tmp_path), (tmp_path / "README.md").read_text()
    assert len(found) == len(said)
    for sentence, start in zip(found, said, strict=True):
        assert re.match(start, sentence)
        assert f"- {sentence}\n" in text
    served = all(sentence.startswith(("Start its", "vLLM 0.33.0 reads")) for sentence in found)
    assert ("vllm serve path/to/base --enable-lora" in text) == served
    assert ("lightning-peft merge" in text) != served


def test_a_convolution_is_nothing_for_vllm(tmp_path):
    model = lp.inject(nn.Sequential(nn.Conv2d(4, 12, 3), nn.Linear(4, 4)), lp.LoRA(rank=2, targets=["0", "1"]))
    lp.export_peft(model, tmp_path)
    (sentence,) = lp.vllm_problems(tmp_path)
    assert sentence.endswith("not the convolution base_model.model.0.")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"r": 600}, "Rank 600 is above 512"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', which changes the base's weights"),
        ({"init_lora_weights": "gaussian"}, None),
        ({"use_qalora": True}, r"QALoRA \(use_qalora\)"),
        (
            {"modules_to_save": ["score", "classifier"]},
            "takes one head, named classifier or score, not score, classifier",
        ),
    ],
)
def test_settings_that_others_write_are_known(settings, said, tmp_path):
    exported(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert [bool(re.search(said or "", sentence)) for sentence in lp.vllm_problems(tmp_path)] == [True] * bool(said)


def test_a_rank_gets_the_next_value_that_the_option_may_have(tmp_path):
    exported(tmp_path)
    path = tmp_path / "adapter_config.json"
    for rank, value in ((17, 32), (32, 32), (33, 64), (257, 320), (512, 512)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"r": rank}))
        (sentence,) = lp.vllm_problems(tmp_path)
        assert f"--max-lora-rank {value}: rank {rank} " in sentence
        assert value >= rank
        assert math.log2(value).is_integer() or value == 320


def test_only_folders_of_hf_peft_are_judged(tmp_path):
    lp.save_adapter(adapted("llama", lp.LoRA(rank=2)), tmp_path)
    with pytest.raises(ValueError, match="names no peft_type"):
        lp.vllm_problems(tmp_path)
