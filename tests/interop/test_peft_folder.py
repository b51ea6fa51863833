"""Folders of HF PEFT, against installed peft: ours there, theirs here, and back again."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from models import MODELS, logits
from peft_models import BASES, adapted, disturbed
from safetensors.torch import load_file
from sampling import diagonal
from torch import nn

import lightning_peft as lp

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed"),
    pytest.mark.filterwarnings("ignore"),  # peft's own advice, and what it calls
]


TRANSFORMERS = ("bert", "llama", "gpt2", "t5")


def through_peft(name, folder):
    import peft

    return peft.PeftModel.from_pretrained(BASES[name](), folder).eval()


@torch.no_grad()
def answer(model, name, length=0, **options):
    """Return logits, without those of ``length`` virtual tokens in front."""
    output = logits(model(**BASES[name].inputs(**options)))
    return output[:, length:] if length and output.dim() == 3 else output


@pytest.fixture(scope="module", autouse=True)
def table():
    """Print the largest difference of each method, model and direction, in one table."""
    cells = CELLS
    cells.clear()
    yield
    rows, names = sorted({row for row, _, _ in cells}), sorted({name for _, name, _ in cells})
    print("\n" + f"{'largest difference':>22}" + "".join(f"{name:>13}" for name in names))
    for row in rows:
        found = [[cells[key] for key in cells if key[:2] == (row, name)] for name in names]
        print(f"{row:>22}" + "".join(f"{f'{max(f):.1e}' if f else '-':>13}" for f in found))


CELLS = {}


def require_equal(what, y, z, base=None):
    difference = (y - z).abs().max().item()
    row, _, rest = what.partition(" on ")
    name, _, way = rest.partition(", ")
    CELLS[row, name, way] = max(difference, CELLS.get((row, name, way), 0.0))
    print(f"{what}: largest difference {difference:.1e} of {z.abs().max():.1f}")
    assert difference < 1e-5
    if base is not None:
        assert (z - base).abs().max() > 1e-3, "the adapter changes nothing"


def adapter_tensors(model):
    return {key: value for key, value in model.state_dict().items() if ".peft." in key}


def values(model):
    """Return all values, copies that an imported adapter has under the names of the parameters that they replace."""
    stored = model.state_dict()
    copies = {re.sub(r"peft\.\w+_own\.own\.", "", key): value for key, value in stored.items() if "_own.own." in key}
    return {key: value for key, value in stored.items() if "_own.own." not in key} | copies


def require_round_trip(name, method, folder, also_train=(), exact=True, length=0):
    """Ours to peft, and ours to peft's files and back."""
    model = adapted(name, method, also_train)
    lp.export_peft(model, folder / "ours")
    base, own = answer(BASES[name](), name), answer(model, name)
    theirs = through_peft(name, folder / "ours")
    require_equal(f"{type(method).__name__} on {name}, ours in peft", answer(theirs, name, length), own, base)
    theirs.save_pretrained(folder / "theirs")
    back = lp.import_peft(BASES[name](), folder / "theirs").eval()
    require_equal(f"{type(method).__name__} on {name}, and back", answer(back, name), own, base)
    if exact:
        before, after = values(model), values(back)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    return back


def require_import(name, config, folder, length=0):
    """Theirs to ours: the same logits; and training goes on."""
    import peft

    torch.manual_seed(3)
    theirs = disturbed(peft.get_peft_model(BASES[name](), config))
    theirs.save_pretrained(folder)
    model = lp.import_peft(BASES[name](), folder).eval()
    what = f"{config.peft_type.value} of peft on {name}, theirs here"
    require_equal(what, answer(model, name), answer(theirs, name, length), answer(BASES[name](), name))
    require_training(model, name)
    return model


def require_training(model, name):
    """Training goes on: what trains has gradients, and two steps make a loss smaller."""
    trained, losses = [p for p in model.parameters() if p.requires_grad], []
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss = logits(model.train()(**BASES[name].inputs())).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


LORAS = {
    "plain": (lp.LoRA(rank=4, alpha=6), True),
    "all-linear": (lp.LoRA(rank=3, alpha=5, targets=["all-linear"]), True),
    "rooted": (lp.LoRA(rank=4, scaling="rank_stabilized", targets=["feedforward.down"]), True),
    "dora": (lp.LoRA(rank=4, decompose=True, targets=["feedforward.down", "feedforward.up"]), True),
    "pissa": (lp.LoRA(rank=2, init="pissa", targets=["feedforward.down"]), False),
    "olora": (lp.LoRA(rank=2, init="olora", targets=["attention.output"]), False),
    "patterns": (
        lp.LoRA(
            rank=4,
            targets=["attention.output", "feedforward.down"],
            alpha_pattern={"*1.*": 3.5},
            rank_pattern={"*2.*": 7},
        ),
        True,
    ),
}


@diagonal(("name", "kind"), TRANSFORMERS, LORAS)
def test_lora_computes_the_same_there_and_comes_back(name, kind, tmp_path):
    method, exact = LORAS[kind]
    parts = name == "gpt2" and kind in ("plain", "all-linear")  # which become one pair of higher rank
    require_round_trip(name, method, tmp_path, exact=exact and not parts)


TARGETS = {
    "bert": ["query", "output.dense"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "t5": ["q", "v", "wo"],
}
NARROW = {"bert": "query", "llama": "v_proj", "gpt2": "c_attn", "t5": "wo"}
TASKS = {"bert": "SEQ_CLS", "tagger": "TOKEN_CLS", "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}


@diagonal(
    ("name", "settings"),
    TRANSFORMERS,
    [{}, {"use_dora": True}, {"use_rslora": True, "bias": "all"}, {"bias": "lora_only"}],
)
def test_lora_of_peft_computes_the_same_here(name, settings, tmp_path):
    import peft

    pattern = {"rank_pattern": {NARROW[name]: 5}, "alpha_pattern": {r".*\.1\..*": 7}}
    config = peft.LoraConfig(task_type=TASKS[name], target_modules=TARGETS[name], r=4, **pattern, **settings)
    require_import(name, config, tmp_path)


WORDINGS = {
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "all linear layers": {"target_modules": "all-linear"},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
    "an expression": {
        "target_modules": r".*[01]\..*(q_proj|up_proj)",
        "exclude_modules": ["layers.0.self_attn.q_proj"],
    },
    "modules": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    "pissa": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "olora": {"target_modules": ["v_proj", "down_proj"], "init_lora_weights": "olora"},
}


@pytest.mark.parametrize("kind", WORDINGS)
def test_wordings_of_peft_are_understood(kind, tmp_path):
    import peft

    require_import("llama", peft.LoraConfig(task_type="CAUSAL_LM", r=3, **WORDINGS[kind]), tmp_path)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_ia3_computes_the_same_there_and_here(name, tmp_path):
    import peft

    require_round_trip(name, lp.IA3(), tmp_path, exact=name != "gpt2")
    inside = TARGETS[name][-1:]
    config = peft.IA3Config(task_type=TASKS[name], target_modules=TARGETS[name], feedforward_modules=inside)
    require_import(name, config, tmp_path / "more")


def test_a_head_is_saved_whole(tmp_path):
    model = adapted("bert", lp.LoRA(rank=4), ["classifier"])
    lp.export_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]
    assert config["task_type"] == "SEQ_CLS"
    assert config["target_modules"] == ["query", "value"]
    require_equal("a head on bert, ours in peft", answer(through_peft("bert", tmp_path), "bert"), answer(model, "bert"))
    back = lp.import_peft(BASES["bert"](), tmp_path)
    before, after = values(model), values(back)
    assert all(torch.equal(before[key], after[key]) for key in before)
    trains = {n.replace("peft.lora_own.own.", "") for n, p in back.named_parameters() if p.requires_grad}
    assert trains == {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "method", [lp.LoRA(rank=4), lp.AdaLoRA(initial_rank=3, target_rank=2)], ids=["lora", "adalora"]
)
def test_biases_beside_an_adapter_are_a_setting(method, tmp_path):
    model = disturbed(lp.inject(BASES["bert"](), [method, lp.BitFit()]))
    lp.export_peft(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["bias"] == "all"
    require_equal("biases on bert, ours in peft", answer(through_peft("bert", tmp_path), "bert"), answer(model, "bert"))
    require_equal(
        "biases on bert, and back", answer(lp.import_peft(BASES["bert"](), tmp_path), "bert"), answer(model, "bert")
    )


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_adalora_computes_the_same_there_and_here(name, tmp_path):
    import peft

    method = lp.AdaLoRA(initial_rank=4, target_rank=2, alpha=7)
    model = adapted(name, method)
    with torch.no_grad():
        for number, adapter in enumerate(adapter for *_, adapter in lp.adapters(model)):
            adapter.kept[: number % 5] = 0
            adapter.e.mul_(adapter.kept)
    lp.export_peft(model, tmp_path / "ours")
    base, own = answer(BASES[name](), name), answer(model, name)
    theirs = through_peft(name, tmp_path / "ours")
    require_equal(f"AdaLoRA on {name}, ours in peft", answer(theirs, name), own, base)
    theirs.save_pretrained(tmp_path / "theirs")
    back = lp.import_peft(BASES[name](), tmp_path / "theirs").eval()
    require_equal(f"AdaLoRA on {name}, and back", answer(back, name), own, base)
    if name != "gpt2":  # where parts become one
        for (*_, one), (*_, other) in zip(lp.adapters(model), lp.adapters(back), strict=True):
            assert all(
                torch.equal(value, other.export_state()[key])
                for key, value in one.export_state().items()
                if len(one.export_state()["e"])
            )
    config = peft.AdaLoraConfig(
        task_type=TASKS[name], target_modules=TARGETS[name], init_r=5, target_r=3, lora_alpha=7, total_step=10
    )
    require_import(name, config, tmp_path / "more")


KIN = {
    "fedpara": lp.FedPara(rank=3, targets=["all-linear"]),
    "fedpara by gamma": lp.FedPara(gamma=0.1, targets=["all-linear"]),
    "krona": lp.KronA(scale=2, targets=["all-linear"], factor=4),
    "krona of one shape": lp.KronA(scale=1.5, targets=["attention.query"], shape_a=[4, 4]),
}


@diagonal(("name", "kind"), ["bert", "llama", "t5"], KIN)
def test_products_compute_the_same_there_and_come_back(name, kind, tmp_path):
    several = kind in ("fedpara by gamma", "krona")  # ranks or shapes, each of which becomes a method
    back = require_round_trip(name, KIN[kind], tmp_path, exact=False)
    own = {key.replace("_2.", ".").replace("_3.", "."): v for key, v in adapter_tensors(back).items()}
    for key, value in adapter_tensors(adapted(name, KIN[kind])).items():
        assert torch.equal(value, own[key]) or several and any(torch.equal(value, other) for other in own.values())


def test_personal_products_take_one_rank_more(tmp_path):
    method = lp.FedPara(rank=3, personalized=True, targets=["attention.query"])
    require_round_trip("bert", method, tmp_path, exact=False)


@diagonal(
    ("name", "kind", "settings"),
    ["bert", "llama", "t5"],
    ["LoHaConfig", "LoKrConfig"],
    [{"r": 3}, {"r": 4, "alpha": 6}, {"r": 40, "rank_pattern": {r".*\.1\..*": 3}}],
)
def test_products_of_peft_compute_the_same_here(name, kind, settings, tmp_path):
    import peft

    if kind == "LoHaConfig":
        settings = settings | {"r": min(settings["r"], 4)}
    config = getattr(peft, kind)(task_type=TASKS[name], target_modules=TARGETS[name], **settings)
    require_import(name, config, tmp_path)


PROMPTED = ("tagger", "llama", "gpt2", "t5")
PROMPTS = {
    "prompt": lp.PromptTuning(length=3),
    "lstm": lp.PTuning(length=3),
    "vectors": lp.PTuning(length=3, encoder="none"),
}


@diagonal(("name", "kind"), PROMPTED, PROMPTS)
def test_prompts_compute_the_same_there_and_come_back(name, kind, tmp_path):
    length = 3 if name != "t5" else 0
    require_round_trip(name, PROMPTS[kind], tmp_path, exact=kind != "lstm", length=length)


@diagonal(("name", "kind"), PROMPTED, ["PromptTuningConfig", "PromptEncoderConfig"])
def test_prompts_of_peft_compute_the_same_here(name, kind, tmp_path):
    import peft

    settings = {"encoder_hidden_size": 8} if kind == "PromptEncoderConfig" else {}
    config = getattr(peft, kind)(task_type=TASKS[name], num_virtual_tokens=4, **settings)
    require_import(name, config, tmp_path, length=4 if name != "t5" else 0)


@pytest.mark.parametrize("name", PROMPTED[:3])
def test_prompts_of_tasks_compute_the_same_there_and_here(name, tmp_path):
    import peft

    length, ids = 3, torch.tensor([1, 0])
    model = adapted(name, lp.MultitaskPromptTuning(length=3, tasks=2))
    lp.export_peft(model, tmp_path / "ours")
    theirs = through_peft(name, tmp_path / "ours")
    with lp.row_tasks(model, ids), torch.no_grad():
        own = answer(model, name)
        their = logits(theirs(**BASES[name].inputs(), task_ids=ids))[:, length:]
    require_equal(f"MultitaskPromptTuning on {name}, ours in peft", their, own, answer(BASES[name](), name))
    config = peft.MultitaskPromptTuningConfig(task_type=TASKS[name], num_virtual_tokens=3, num_tasks=2)
    torch.manual_seed(3)
    theirs = disturbed(peft.get_peft_model(BASES[name](), config))
    theirs.save_pretrained(tmp_path / "theirs")
    back = lp.import_peft(BASES[name](), tmp_path / "theirs").eval()
    with lp.row_tasks(back, ids), torch.no_grad():
        own = answer(back, name)
        their = logits(theirs(**BASES[name].inputs(), task_ids=ids))
    require_equal(f"MultitaskPromptTuning on {name}, theirs here", own, their[:, length:])


@pytest.mark.parametrize("name", ["bert", "tagger", "llama", "gpt2"])
def test_prefixes_compute_the_same_there_and_here(name, tmp_path):
    import peft

    for kind in (True, False):
        method = lp.PrefixTuning(length=3, hidden_size=8, reparameterize=kind, shift_positions=True)
        try:
            require_round_trip(name, method, tmp_path / str(kind), exact=not kind)
        except ValueError as error:
            if "does not support past key values" not in str(error):
                raise
            pytest.skip("peft looks for past_key_values, which transformers calls cache from 5.24 on")
        config = peft.PrefixTuningConfig(
            task_type=TASKS[name], num_virtual_tokens=3, prefix_projection=kind, encoder_hidden_size=8
        )
        require_import(name, config, tmp_path / f"theirs {kind}")


def test_llama_adapter_computes_the_same_there_and_here(tmp_path):
    import peft

    model = adapted("llama", lp.LLaMAAdapter(length=3, layers=2))
    with torch.no_grad():
        for *_, adapter in lp.adapters(model):
            adapter.gate.copy_(adapter.gate[:1].expand(4).clone())
    lp.export_peft(model, tmp_path / "ours")
    base, own = answer(BASES["llama"](), "llama"), answer(model, "llama")
    theirs = through_peft("llama", tmp_path / "ours")
    require_equal("LLaMAAdapter on llama, ours in peft", answer(theirs, "llama"), own, base)
    theirs.save_pretrained(tmp_path / "theirs")
    back = lp.import_peft(BASES["llama"](), tmp_path / "theirs").eval()
    require_equal("LLaMAAdapter on llama, and back", answer(back, "llama"), own, base)
    require_import("llama", peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"), tmp_path)


@pytest.mark.parametrize(("name", "target"), [("llama", "v_proj"), ("t5", "v")])
def test_added_biases_compute_the_same_there_and_here(name, target, tmp_path):
    import peft

    require_round_trip(name, lp.BitFit(add_missing=True), tmp_path)
    require_import(name, peft.BeftConfig(task_type=TASKS[name], target_modules=[target]), tmp_path / "more")
    config = peft.BeftConfig(task_type="SEQ_CLS", target_modules=["value"])
    peft.get_peft_model(BASES["bert"](), config).save_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="A bias beside that of bert.encoder.layer.0.attention.self.value"):
        lp.import_peft(BASES["bert"](), tmp_path / "own")


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(4, 12, 3), nn.Conv2d(12, 8, 2)
        self.config = {}

    def forward(self, x):
        return self.two(self.one(x).relu())


PICTURES = [lp.FedPara(rank=2), lp.FedPara(rank=2, cores=False), lp.KronA(factor=2), lp.IA3(), lp.LoRA(rank=3)]


@pytest.mark.parametrize("method", PICTURES, ids=lambda method: type(method).__name__)
def test_convolutions_compute_the_same_there_and_come_back(method, tmp_path):
    import dataclasses

    import peft

    targets = (
        {"targets": ["one"], "feedforward_targets": ["two"]} if method.name == "ia3" else {"targets": ["one", "two"]}
    )
    model = disturbed(lp.inject(Pictures(), dataclasses.replace(method, **targets)))
    x = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(1))
    lp.export_peft(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Pictures(), tmp_path / "ours").eval()
    require_equal(f"{type(method).__name__} on convolutions, ours in peft", theirs(x), model(x), Pictures()(x))
    theirs.save_pretrained(tmp_path / "theirs")
    back = lp.import_peft(Pictures(), tmp_path / "theirs").eval()
    require_equal(f"{type(method).__name__} on convolutions, and back", back(x), model(x), Pictures()(x))


class Small(nn.Module):
    """What transformers' models have not: convolutions, and an embedding of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.conv = nn.Embedding(11, 8), nn.Conv1d(8, 12, 3, padding=1)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 3)
        self.config = {}

    def forward(self, ids):
        return self.head(self.norm(self.conv(self.table(ids).mT).mT))


@pytest.mark.parametrize("decompose", [False, True])
def test_lora_on_embeddings_and_convolutions(decompose, tmp_path):
    import peft

    method = lp.LoRA(rank=3, alpha=5, decompose=decompose, targets=["table", "conv", "head"])
    ids = torch.arange(22).view(2, 11) % 11
    model = disturbed(lp.inject(Small(), method, ["norm"]))
    lp.export_peft(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(Small(), tmp_path / "ours").eval()
    require_equal("LoRA on embeddings, ours in peft", theirs(ids), model(ids), Small()(ids))
    theirs.save_pretrained(tmp_path / "theirs")
    back = lp.import_peft(Small(), tmp_path / "theirs")
    assert all(torch.equal(value, values(back)[key]) for key, value in model.state_dict().items())


def test_the_network_in_a_module_is_found(tmp_path):
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = BASES["bert"]()

    outer = disturbed(lp.inject(Module(), lp.LoRA(rank=4), ["classifier"]))
    lp.export_peft(outer, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.classifier.weight" in keys
    require_equal(
        "LoRA on a module, ours in peft",
        answer(through_peft("bert", tmp_path), "bert"),
        answer(outer.net, "bert"),
    )
    back = lp.import_peft(Module(), tmp_path)
    assert all(torch.equal(value, values(back)[key]) for key, value in outer.state_dict().items())


def qwen():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=9, num_key_value_heads=2, **sizes))


REFUSED = [
    (lambda: lp.inject(BASES["bert"](), lp.Bottleneck()), "HF PEFT has no Bottleneck"),
    (lambda: lp.inject(BASES["bert"](), [lp.LoRA(), lp.IA3()]), r"lora \(LoRA\), ia3 \(IA3\)"),
    (lambda: lp.inject(BASES["bert"](), lp.BitFit()), "none with adapters"),
    (lambda: lp.inject(BASES["gpt2"](), lp.LoRA(decompose=True)), "DoRA on the query part of transformer.h.0.attn"),
    (lambda: lp.inject(BASES["encoder"](), lp.LoRA()), "torch's attention reads its weight"),
    (
        lambda: lp.inject(BASES["bert"](), lp.LoRA(), ["classifier.weight"]),
        "Training classifier .*: bias in it is frozen",
    ),
    (MODELS["bert"], "Nothing was injected"),
    (lambda: lp.inject(BASES["gpt2"](), lp.OutputLayers()), "none with adapters"),
    (lambda: lp.inject(BASES["bert"](), lp.FedPara(rank=2, tanh=True)), "tanh in FedPara"),
    (lambda: lp.inject(BASES["gpt2"](), lp.FedPara(rank=2)), "LoHa on transformer.h.0.attn.c_attn.*no Conv1D"),
    (lambda: adapted("llama", lp.LLaMAAdapter(length=3)), "gates at model.layers.2.self_attn"),
    (lambda: lp.inject(BASES["llama"](), lp.LLaMAAdapter(train_norms=True)), "ADAPTION_PROMPT has adapters alone"),
    (lambda: lp.inject(BASES["gpt2"](), lp.LLaMAAdapter()), "otherwise than LLaMA-Adapter"),
    (lambda: lp.inject(qwen(), lp.LLaMAAdapter()), "LLaMAAdapter on qwen2 .*adapts llama and mistral alone"),
    (lambda: lp.inject(BASES["llama"](), lp.PrefixTuning()), "shift_positions=False cannot be exchanged"),
    (lambda: lp.inject(BASES["t5"](), lp.PrefixTuning()), "prefix for an encoder-decoder model"),
    (lambda: lp.inject(BASES["bert"](), lp.PromptTuning()), "classifier reads a virtual token"),
    (lambda: lp.inject(BASES["bert"]().bert, lp.PromptTuning()), "PromptTuning on BertModel.*known tasks alone"),
    (lambda: lp.inject(BASES["llama"](), lp.PromptTuning(tasks=2)), "PromptTuning with 2 tasks"),
    (lambda: lp.inject(BASES["bert"](), lp.PTuning(template="[P:2] {x} {mask}")), r"template='\[P:2\] \{x\}"),
    (lambda: lp.inject(BASES["bert"](), lp.KronA(shape_a=[2, 8])), "no one factor gives the shapes"),
    (
        lambda: lp.inject(Small(), lp.AdaLoRA(initial_rank=2, target_rank=1, targets=["table"])),
        "adapts linear layers and Conv2d, not Embedding",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_cannot_be_expressed_is_refused_and_nothing_written(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        lp.export_peft(make(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def _written(folder, **config):
    """Write a good folder, then other settings into it."""
    lp.export_peft(adapted("bert", lp.LoRA(rank=4), ["classifier"]), folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def _without(folder, part):
    from safetensors.torch import save_file

    _written(folder)
    path = folder / "adapter_model.safetensors"
    save_file({key: value.clone() for key, value in load_file(path).items() if part not in key}, path)


def test_a_model_without_values_is_refused(tmp_path):
    with torch.device("meta"):
        model = lp.inject(MODELS["llama"].make(), lp.LoRA(rank=3))
    with pytest.raises(ValueError, match="has no values yet"):
        lp.export_peft(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


BROKEN = [
    (lambda f: _written(f, peft_type="VERA"), "VERA adapter, which is not read"),
    (lambda f: _written(f, init_lora_weights="corda"), "init_lora_weights='corda' .* changes the base's weights"),
    (lambda f: _written(f, trainable_token_indices=[1]), r"sets trainable_token_indices=\[1\], but it has no rows"),
    (
        lambda f: _written(f, target_parameters=["experts.down_proj"]),
        "sets target_parameters 'experts.down_proj', which is no parameter",
    ),
    (lambda f: _written(f, lora_bias=True), "sets {'lora_bias': True}"),
    (lambda f: _written(f, target_modules=["query", "key"]), r"layer.0.attention.self.key.*no tensors"),
    (lambda f: _written(f, modules_to_save=["pooler"]), r"saves \['pooler'\], but lacks"),
    (lambda f: _written(f, modules_to_save=None), "brings another classifier"),
    (lambda f: _without(f, "layer.1.attention.self.query.lora_B"), r"layer.1.attention.self.query lacks \['b'\]"),
    (lambda f: _without(f, "layer.1.attention.self.query"), r"layer.1.attention.self.query'\], but it has no tensors"),
    (lambda f: _written(f, use_dora=True), r"lacks \['magnitude'\]"),
]


@pytest.mark.parametrize(("write", "message"), BROKEN)
def test_a_file_that_does_not_fit_changes_nothing(write, message, tmp_path):
    write(tmp_path)
    model = BASES["bert"]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        lp.import_peft(model, tmp_path)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.requires_grad for p in model.parameters())


def test_damaged_and_missing_files_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"):
        lp.import_peft(BASES["bert"](), tmp_path)
    _written(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="damaged or cut short"):
        lp.import_peft(BASES["bert"](), tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither adapter_model.safetensors nor adapter_model.bin"):
        lp.import_peft(BASES["bert"](), tmp_path)
    torch.save({"key": Path("/")}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        lp.import_peft(BASES["bert"](), tmp_path)
    lp.save_adapter(adapted("bert", lp.LoRA()), tmp_path / "own")
    with pytest.raises(ValueError, match="comes back by load_adapter"):
        lp.import_peft(BASES["bert"](), tmp_path / "own")


def test_another_model_is_an_error_that_names_the_modules(tmp_path):
    _written(tmp_path)
    with pytest.raises(
        ValueError, match="adapts .*bert.encoder.layer.0.attention.self.query.* which the model has not"
    ):
        lp.import_peft(BASES["distilbert"](), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_named_adapter_takes_the_head_of_its_own_along(dtype, tmp_path):
    model = BASES["bert"]().to(dtype)
    for number, name in enumerate("ab"):
        lp.add_adapter(model, lp.LoRA(rank=2), name, also_train=["classifier"])
        lp.activate(model, name)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for name in "ab":
        lp.export_peft(model, tmp_path / name, name)
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert config["modules_to_save"] == ["classifier"]
        lp.activate(model, name)
        back = lp.import_peft(BASES["bert"]().to(dtype), tmp_path / name).eval()
        assert torch.equal(answer(back, "bert"), answer(model.eval(), "bert"))
        card = (tmp_path / name / "README.md").read_text()
        assert (
            f"| LoRA ({name}) | 6 | 768 |\n| OwnParameters ({name}_own) | 1 | 99 |\n| all of these |  | 867 of " in card
        )
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    theirs = through_peft("bert", tmp_path / "b")
    lp.activate(model, "b")
    if dtype == torch.float32:
        require_equal("a head of its own on bert, ours in peft", answer(theirs, "bert"), answer(model, "bert"))


def test_a_name_of_several_methods_is_no_folder(tmp_path):
    model = lp.add_adapter(BASES["bert"](), [lp.LoRA(rank=2), lp.LLaMAAdapter(length=2)], "both")
    with pytest.raises(ValueError, match=r"'both' stands for both \(LoRA\), both_2 \(LLaMAAdapter\)"):
        lp.export_peft(model, tmp_path, "both")
    lp.add_adapter(model, lp.LoRA(rank=2), "alone")
    lp.export_peft(model, tmp_path, "alone")
