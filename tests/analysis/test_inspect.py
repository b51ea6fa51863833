"""What adapter files hold and in what they differ, beside figures that are computed afresh from whole matrices."""

import json
import math

import pytest
import torch
from adapter_edits import edit_json, edit_tensors, stir
from models import MODELS, tokens
from safetensors.torch import load_file
from sampling import Laws
from torch import nn
from torch.utils.data import DataLoader
from trainer_models import Module, trainer

import lightning_peft as lp
from lightning_peft.analysis.inspect.format_text import difference_text, report_text
from lightning_peft.cli.main import main

PAIRED = {
    "patterns": ("llama", lp.LoRA(rank=3, alpha=6, rank_pattern={"q_proj": 5}, alpha_pattern={"1.self_attn.*": 2})),
    "rooted": ("gpt2", lp.LoRA(rank=4, alpha=6, scaling="rank_stabilized")),
    "pissa": ("bert", lp.LoRA(rank=4, init="pissa")),
    "convolution": ("fused_vit", lp.LoRA(rank=2, targets=["patch_embed", "attention.query", "attention.value"])),
    "adalora": ("bert", lp.AdaLoRA(initial_rank=4, target_rank=2, targets=["attention.query"])),
}


def made(base, methods, seed=0, **kwargs):
    """A model whose adapters matter; of AdaLoRA, some triplets are given up."""
    torch.manual_seed(3)
    net = lp.inject(MODELS[base](), methods, **kwargs)
    stir(net, seed)
    for number, (*_, adapter) in enumerate(lp.adapters(net)):
        if hasattr(adapter, "kept"):
            adapter.kept[number + 1 :] = 0
            adapter.e.data *= adapter.kept
    return net


def live(net):
    """Updates by place, as whole matrices."""
    return {
        f"{name}.{adapter.part}".strip("."): adapter.delta().detach().flatten(1).double()
        for name, _, _, adapter in lp.adapters(net)
    }


@Laws()()
def test_what_any_method_saves_can_be_read_and_equals_itself(case, tmp_path):
    net = made(case.model, list(case.methods))
    folder = lp.save_adapter(net, tmp_path / "one")
    found, state = lp.inspect_adapter(folder), load_file(folder / "adapter_model.safetensors")
    assert found["parameters"] == sum(value.numel() for value in state.values())
    assert {row["key"] for row in found["tensors"]} == state.keys()
    assert sum(row["parameters"] for row in found["table"]) == found["parameters"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert f"{found['parameters']:,} parameters" in report_text(found)
    same = lp.compare_adapters(folder, folder)
    assert same["equal"]
    assert same["settings"] == same["only_in_one"] == same["only_in_other"] == same["shapes"] == []
    assert {row["key"] for row in same["tensors"]} == state.keys()
    assert json.loads(json.dumps(same, allow_nan=False)) == same
    assert "to the bit" in difference_text(same)


def test_a_place_without_any_rank_left_has_no_update(tmp_path):
    net = made(*PAIRED["adalora"])
    adapter = net.bert.encoder.layer[1].attention.self.query.peft["adalora"]
    adapter.kept.zero_()
    adapter.e.data.zero_()
    found = lp.inspect_adapter(lp.save_adapter(net, tmp_path / "one"))
    assert [(row["rank"], row["norm"] > 0) for row in found["places"]] == [(1, True), (0, False), (3, True)]
    assert found["places"][1]["largest"] == 0
    one = lp.save_adapter(made(*PAIRED["adalora"]), tmp_path / "other")
    rows = lp.compare_adapters(tmp_path / "one", one)["updates"]
    assert rows[1]["relative"] is None
    assert rows[1]["difference"] == pytest.approx(rows[1]["other"])


@pytest.mark.parametrize("case", PAIRED)
def test_norms_of_updates_are_those_of_whole_matrices(case, tmp_path):
    net = made(*PAIRED[case])
    found = lp.inspect_adapter(lp.save_adapter(net, tmp_path))
    expected = live(net)
    assert {row["place"] for row in found["places"]} == expected.keys()
    for row in found["places"]:
        delta = expected[row["place"]]
        assert row["norm"] == pytest.approx(delta.norm().item(), rel=1e-5)
        assert row["largest"] == pytest.approx(torch.linalg.matrix_norm(delta, 2).item(), rel=1e-5)
        assert row["rank"] == torch.linalg.matrix_rank(delta, rtol=1e-5)
    assert found["warnings"] == []


def test_ranks_are_those_that_are_left(tmp_path):
    found = lp.inspect_adapter(lp.save_adapter(made(*PAIRED["adalora"]), tmp_path / "pruned"))
    assert found["ranks"] == {"adalora": {"min": 1, "max": 3, "histogram": {"1": 1, "2": 1, "3": 1}}}
    found = lp.inspect_adapter(lp.save_adapter(made(*PAIRED["patterns"]), tmp_path / "patterns"))
    assert found["ranks"] == {"lora": {"min": 3, "max": 5, "histogram": {"3": 3, "5": 3}}}


def test_the_report_counts_by_method_and_kind_of_layer(tmp_path):
    net = made("bert", [lp.LoRA(rank=2), lp.LLaMAAdapter(length=3)], also_train=["classifier"])
    found = lp.inspect_adapter(lp.save_adapter(net, tmp_path))
    rows = {(row["name"], row["kind"]): row for row in found["table"]}
    query = rows["lora", "bert.encoder.layer.*.attention.self.query"]
    assert (query["method"], query["places"], query["parameters"]) == ("LoRA", 3, 3 * 2 * 2 * 32)
    norms = [net.bert.encoder.layer[i].attention.self.query.peft["lora"].a.norm().item() for i in range(3)]
    a = query["tensors"]["a"]
    assert (a["shape"], a["dtype"]) == ([2, 32], "float32")
    assert a["norm"] == pytest.approx([min(norms), max(norms)])
    gate = net.bert.encoder.layer[2].attention.self.peft["llama_adapter"].gate.tanh()
    (row,) = [row for row in found["places"] if row["name"] == "llama_adapter"]
    assert row["gates"] == pytest.approx(gate.tolist())
    assert rows["", "classifier.weight"]["parameters"] == 96
    assert found["parameters"] == sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert found["bytes"] == 4 * found["parameters"]
    assert found["dtypes"] == {"torch.float32": found["parameters"]}
    assert found["also_train"] == ["classifier"]
    assert [method["method"] for method in found["methods"]] == ["LoRA", "LLaMAAdapter"]
    state = lp.inspect_adapter(tmp_path)["tensors"]
    assert {row["key"]: row["norm"] for row in state} == {
        key: pytest.approx(value.float().norm().item()) for key, value in net.state_dict().items()
        if ".peft." in key or "classifier" in key
    }  # fmt: skip


def test_methods_of_similar_names_are_told_apart(tmp_path):
    net = made("llama", [lp.LoRA(name="lora", rank=2), lp.LoRA(name="lora_b", rank=3)])
    found = lp.inspect_adapter(lp.save_adapter(net, tmp_path))
    assert {name: ranks["histogram"] for name, ranks in found["ranks"].items()} == {
        "lora": {"2": 6},
        "lora_b": {"3": 6},
    }


def test_a_checkpoint_is_read_like_a_folder(tmp_path):
    module = Module("bert")
    runs = trainer(
        lp.PEFTStrategy(lp.AdaLoRA(initial_rank=3, target_rank=2, warmup_steps=0, final_steps=0)), max_steps=4
    )
    runs.fit(module, DataLoader(tokens(4), batch_size=1))
    runs.save_checkpoint(tmp_path / "run.ckpt")
    lp.save_adapter(module, tmp_path / "folder")
    one, other = (lp.inspect_adapter(tmp_path / name) for name in ("folder", "run.ckpt"))
    assert one["base"] == other["base"] is not None
    assert one["methods"] == other["methods"]
    assert one["ranks"] == other["ranks"]
    for left, right in zip(one["places"], other["places"], strict=True):
        assert (left["place"], left["rank"]) == (right["place"], right["rank"])
        assert left["norm"] == pytest.approx(right["norm"])
    found = lp.compare_adapters(tmp_path / "folder", tmp_path / "run.ckpt")
    assert found["all_updates"]["relative"] < 1e-6


@pytest.mark.parametrize("case", ["patterns", "rooted", "adalora", "pissa"])
def test_a_folder_of_peft_is_read_too(case, tmp_path):
    net = made(*PAIRED[case])
    lp.export_peft(net, tmp_path / "theirs")
    found, expected = lp.inspect_adapter(tmp_path / "theirs"), live(net)
    assert found["library"] == "peft"
    assert found["methods"][0]["method"] == {"adalora": "ADALORA"}.get(case, "LORA")
    for row in found["places"]:
        delta = [value for name, value in expected.items() if name.startswith(row["place"])]  # its parts, side by side
        assert row["norm"] == pytest.approx(math.sqrt(sum(d.square().sum().item() for d in delta)), rel=1e-5)
    assert len(found["places"]) == len({name.removesuffix(".query").removesuffix(".value") for name in expected}) or (
        case in ("adalora", "pissa")
    )
    if case in ("patterns", "adalora", "pissa"):
        same = lp.compare_adapters(lp.save_adapter(net, tmp_path / "ours"), tmp_path / "theirs")
        assert len(same["updates"]) == len(expected)
        assert same["all_updates"]["relative"] < 1e-6


def test_numbers_that_are_none_are_named_and_json_stays_json(tmp_path, capsys):
    folder = lp.save_adapter(made("llama", lp.LoRA(rank=2)), tmp_path / "odd")
    key = "model.layers.1.self_attn.v_proj.peft.lora.b"

    def spoil(state):
        state[key][0, 0], state[key][1, :] = math.nan, math.inf

    edit_tensors(folder, spoil)
    found = lp.inspect_adapter(folder)
    assert found["warnings"] == [f"{key} has 1 NaN and 2 infinite values"]
    (row,) = [row for row in found["tensors"] if row["key"] == key]
    assert (row["norm"], row["nan"], row["inf"]) == (None, 1, 2)
    main(["inspect", str(folder), "--json"])
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["warnings"] == found["warnings"]
    other = lp.save_adapter(made("llama", lp.LoRA(rank=2), 1), tmp_path / "other")
    main(["inspect", str(folder), str(other), "--json"])
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["all"]["difference"] is None
    assert not report["equal"]
    main(["inspect", str(folder)])
    assert f"warning: {key} has 1 NaN" in capsys.readouterr().out
    main(["inspect", str(folder), str(other)])
    assert "nan" not in capsys.readouterr().out


def test_settings_that_are_no_numbers_stay_out_of_json(tmp_path, capsys):
    folder = lp.save_adapter(made("llama", lp.LoRA(rank=2)), tmp_path / "odd")
    one = lp.save_adapter(made("llama", lp.LoRA(rank=2)), tmp_path / "one")
    edit_json(folder, methods=[{"method": "LoRA", "name": "lora", "alpha": math.nan, "rank_pattern": {"q": math.inf}}])
    for words in ([str(folder)], [str(folder), str(one)]):
        main(["inspect", *words, "--json"])
        json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert lp.inspect_adapter(folder)["methods"][0]["rank_pattern"] == {"q": None}


THEIRS = [
    lp.IA3(),
    lp.FedPara(rank=2),
    lp.KronA(scale=2, shape_a=[4, 4]),
    lp.PromptTuning(length=3),
    lp.PrefixTuning(length=3, hidden_size=8, shift_positions=True),
]


@pytest.mark.parametrize("method", THEIRS, ids=lambda method: method.name)
def test_every_tensor_of_a_folder_of_peft_has_its_place(method, tmp_path):
    lp.export_peft(made("llama", method), tmp_path)
    found, state = lp.inspect_adapter(tmp_path), load_file(tmp_path / "adapter_model.safetensors")
    assert {row["key"]: row["parameters"] for row in found["tensors"]} == {k: v.numel() for k, v in state.items()}
    assert sum(row["parameters"] for row in found["table"]) == found["parameters"]
    assert f"{found['parameters']:,} parameters" in report_text(found)


def test_an_untrained_adapter_is_said_to_be_one(tmp_path):
    net = lp.inject(MODELS["llama"](), [lp.LoRA(rank=2), lp.LoRA(name="second", rank=2)])
    stir(net, 0)
    for *_, key, adapter in lp.adapters(net):
        if key == "second":
            nn.init.zeros_(adapter.b)
    found = lp.inspect_adapter(lp.save_adapter(net, tmp_path))
    zero, said = found["warnings"]
    assert zero.startswith("all zero: model.layers.0.self_attn.q_proj.peft.second.b, ")
    assert zero.endswith(" and 1 more")
    assert said == "every update of 'second' is zero: it was not trained"


def expected_between(one, other):
    return {
        "one": one.norm().item(),
        "other": other.norm().item(),
        "difference": (one - other).norm().item(),
        "relative": ((one - other).norm() / one.norm()).item(),
        "cosine": ((one * other).sum() / one.norm() / other.norm()).item(),
    }


def test_differences_are_those_of_whole_matrices(tmp_path):
    nets = [made("llama", lp.LoRA(rank=3, alpha=6), seed) for seed in (0, 1)]
    folders = [lp.save_adapter(net, tmp_path / str(number)) for number, net in enumerate(nets)]
    found = lp.compare_adapters(*folders)
    states = [{k: v.double() for k, v in net.state_dict().items() if ".peft." in k} for net in nets]
    for rows, one, other, name in ((found["tensors"], *states, "key"), (found["updates"], *map(live, nets), "place")):
        assert {row[name] for row in rows} == one.keys()
        for row in rows:
            wanted = expected_between(one[row[name]], other[row[name]])
            assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        flat = [torch.cat([side[key].flatten() for key in one]) for side in (one, other)]
        assert found["all" if name == "key" else "all_updates"] == pytest.approx(expected_between(*flat), rel=1e-5)
    assert not found["equal"]
    assert found["settings"] == found["only_in_one"] == found["only_in_other"] == found["shapes"] == []
    assert found["base"]["one"] == found["base"]["other"]


def test_the_same_update_by_other_factors_is_the_same_update(tmp_path):
    net = made("llama", lp.LoRA(rank=3, alpha=6))
    one = lp.save_adapter(net, tmp_path / "one")
    turn = torch.linalg.qr(torch.randn(3, 3)).Q
    for *_, adapter in lp.adapters(net):
        adapter.a.data, adapter.b.data = turn.T @ adapter.a.data, adapter.b.data @ turn
    found = lp.compare_adapters(one, lp.save_adapter(net, tmp_path / "other"))
    assert found["all"]["relative"] > 0.1
    assert found["all_updates"]["relative"] < 1e-6
    assert found["all_updates"]["cosine"] == pytest.approx(1)


def test_equal_is_to_the_bit(tmp_path, capsys):
    net = made("llama", lp.LoRA(rank=3))
    inside = Module()
    one = lp.save_adapter(net, tmp_path / "one")
    lp.load_adapter(inside, one)
    found = lp.compare_adapters(one, lp.save_adapter(inside, tmp_path / "module"))
    assert found["equal"]
    assert found["all"]["difference"] == 0
    assert found["all_updates"]["relative"] < 1e-12
    main(["inspect", str(one), str(tmp_path / "module")])
    assert "all tensors are equal, to the bit" in capsys.readouterr().out
    with torch.no_grad():
        net.model.layers[0].self_attn.q_proj.peft["lora"].b[0, 0].neg_()
    assert not lp.compare_adapters(one, lp.save_adapter(net, tmp_path / "other"))["equal"]


def test_settings_places_and_shapes_that_differ_are_named(tmp_path, capsys):
    one = lp.save_adapter(made("llama", lp.LoRA(rank=3, targets=["q_proj", "k_proj"])), tmp_path / "one")
    net = made("llama", [lp.LoRA(name="mine", rank=4, alpha=8, targets=["q_proj"]), lp.IA3()], also_train=["lm_head"])
    other = lp.save_adapter(net, tmp_path / "other")
    found = lp.compare_adapters(one, other)
    rows = {(row["name"], row["field"]): (row["one"], row["other"]) for row in found["settings"]}
    assert rows["lora", "rank"] == (3, 4)
    assert rows["lora", "alpha"] == (16.0, 8)
    assert rows["lora", "name"] == ("lora", "mine")
    assert rows["ia3", "method"] == (None, "IA3")
    assert rows["", "also_train"] == ([], ["lm_head"])
    assert found["only_in_one"] == [f"model.layers.{i}.self_attn.k_proj.peft.lora.{x}" for i in range(3) for x in "ab"]
    assert "lm_head.weight" in found["only_in_other"]
    assert "model.layers.2.mlp.up_proj.peft.ia3.scales" in found["only_in_other"]
    assert {"key": "model.layers.0.self_attn.q_proj.peft.lora.a", "one": [3, 32], "other": [4, 32]} in found["shapes"]
    deltas = live(lp.load_adapter(MODELS["llama"](), one)), live_of_lora(net)
    (row,) = [row for row in found["updates"] if row["place"] == "model.layers.1.self_attn.q_proj"]
    apart = deltas[0][row["place"]] - deltas[1][row["place"]]
    assert row["difference"] == pytest.approx(apart.norm().item(), rel=1e-5)
    main(["inspect", str(one), str(other)])
    printed = capsys.readouterr().out
    for part in ("lora rank: 3 and 4", "another base, or others of its parameters train", "updates s B A",
                 "only in one: 3 x model.layers.*.self_attn.k_proj.peft.lora.a",
                 "q_proj.peft.lora.a: shape [3, 32] and [4, 32]"):  # fmt: skip
        assert part in printed


def live_of_lora(net):
    return {name: adapter.delta().double() for name, _, key, adapter in lp.adapters(net) if key == "mine"}


def test_a_method_that_the_program_has_not_imported_is_shown(tmp_path):
    folder = lp.save_adapter(made("llama", lp.LoRA(rank=2)), tmp_path)
    edit_json(folder, methods=[{"method": "Strange", "name": "lora", "width": 3}])
    found = lp.inspect_adapter(folder)
    assert found["ranks"] == {}
    assert len(found["places"]) == 6
    assert found["table"][0]["method"] == "Strange"


def test_adapters_of_whole_models_are_aligned(tmp_path):
    net = made("llama", lp.PromptTuning(length=2))
    one = lp.save_adapter(net, tmp_path / "one")
    other = lp.save_adapter(lp.load_adapter(Module(), one), tmp_path / "other")
    assert lp.compare_adapters(one, other)["equal"]


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda path: None, FileNotFoundError, "is no adapter folder: adapter_config.json is missing"),
        (lambda path: path.write_text("x"), ValueError, "no checkpoint that can be read"),
        (lambda path: (path.mkdir(), (path / "adapter_config.json").write_text("{")), FileNotFoundError, "safetensors"),
        (lambda path: (path.mkdir(), (path / "adapter_config.json").write_text('{"peft_type": "LORA"}')),
         FileNotFoundError, "has neither"),
        (lambda path: (path.mkdir(), (path / "meta.pt").write_text("")), ValueError, "each process wrote a part"),
    ],
    ids=["nothing", "text", "damaged", "peft without weights", "parts"],
)  # fmt: skip
def test_what_cannot_be_read_says_so(make, error, said, tmp_path):
    path = tmp_path / "adapter"
    make(path)
    good = lp.save_adapter(lp.inject(MODELS["llama"](), lp.LoRA(rank=2)), tmp_path / "good")
    with pytest.raises(error, match=said):
        lp.inspect_adapter(path)
    with pytest.raises(error, match=said):
        lp.compare_adapters(good, path)
    with pytest.raises(SystemExit, match=said):
        main(["inspect", str(good), str(path)])
