"""Pictures: what they show is what adapters hold and what runs logged."""

import importlib.util
import itertools
import json
import struct

import matplotlib
import pytest
import torch
from models import MODELS
from torch import nn

import lightning_peft as lp
from lightning_peft import plots
from lightning_peft.cli.main import main
from lightning_peft.plots.adapter_values import PlotValues, shorten_names
from lightning_peft.plots.heatmaps import draw_gates
from lightning_peft.plots.pareto import pareto_front


def adapted(method, base="llama"):
    """A model with adapters that have been moved from where they start."""
    model = lp.inject(MODELS[base](), method)
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
    return model


def cells(figure):
    return torch.as_tensor(figure.axes[0].images[0].get_array().filled(float("nan")))


def words(ticks):
    return [label.get_text() for label in ticks]


def text_of(figure):
    return [text.get_text() for text in figure.axes[0].texts]


# Ranks


def test_the_rank_map_has_a_row_for_each_kind_and_a_column_for_each_block():
    model = adapted(lp.AdaLoRA(initial_rank=4, target_rank=2))
    inside = {name: one for name, _, _, one in lp.adapters(model)}
    inside["model.layers.2.mlp.up_proj"].kept[:3] = 0
    figure = plots.rank_map(model)
    (axes,) = figure.axes
    kinds = [name.removeprefix("model.layers.0.") for name in list(inside)[:7]]
    assert words(axes.get_yticklabels()) == kinds
    assert words(axes.get_xticklabels()) == ["0", "1", "2"]
    expected = torch.full((7, 3), 4.0)
    expected[kinds.index("mlp.up_proj"), 2] = 1
    assert torch.equal(cells(figure).float(), expected)
    assert text_of(figure) == [f"{value:g}" for value in expected.flatten().tolist()]
    assert axes.get_title("left") == "81 of 84 triplets kept"
    assert axes.images[0].get_clim() == (0, 4)


def test_the_rank_map_takes_any_names():
    parts = {"encoder": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), "decoder": nn.ModuleList([nn.Linear(4, 4)])}
    model = nn.ModuleDict({**parts, "a<b": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4))})
    method = lp.AdaLoRA(initial_rank=4, target_rank=2, targets=["*"], exclude=["encoder", "decoder", "head"])
    figure = plots.rank_map(lp.inject(model, method))
    (axes,) = figure.axes
    assert words(axes.get_xticklabels()) == ["0", "1", ""]
    assert words(axes.get_yticklabels()) == ["encoder", "decoder", "a<b", "head"]
    assert cells(figure).isnan().tolist() == [[i not in kept for i in range(3)] for kept in ((0, 1), (0,), (2,), (0,))]
    fused = lp.inject(MODELS["gpt2"](), lp.AdaLoRA(initial_rank=4, target_rank=2, targets=["attention.query"]))
    assert words(plots.rank_map(fused).axes[0].get_yticklabels()) == ["attn.c_attn.query"]


# Gates


def test_the_gate_map_has_layers_down_and_heads_across_around_zero():
    model = adapted(lp.LLaMAAdapter(length=3, layers=2))
    gates = [adapter.gate for *_, adapter in lp.adapters(model)]
    figure = plots.gate_map(model)
    axes = figure.axes[0]
    torch.testing.assert_close(cells(figure).float(), torch.stack(gates).detach().tanh())
    assert words(axes.get_yticklabels()) == ["1", "2"]  # the top two of three
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("layer", "head")
    low, high = axes.images[0].get_clim()
    assert high == -low == pytest.approx(cells(figure).abs().max().item())
    assert axes.get_ylim() == (1.5, -0.5)  # the lowest layer on top
    with torch.no_grad():
        for gate in gates:
            gate.zero_()
    closed = plots.gate_map(model).axes[0]
    assert closed.images[0].get_clim() == (-1, 1)
    assert closed.get_title("left") == "tanh(gate): 0 of 8 gates are open"


def test_layers_may_have_other_numbers_of_heads():
    figure = draw_gates({"encoder.0": torch.ones(3), "decoder.0": torch.ones(2)})
    assert cells(figure).isnan().tolist() == [[False] * 3, [False, False, True]]
    assert words(figure.axes[0].get_yticklabels()) == ["encoder", "decoder"]


# Virtual tokens


def cosines(x):
    x = x.detach().double()
    return (x @ x.T) / (x.norm(dim=1)[:, None] * x.norm(dim=1)[None])


@pytest.mark.parametrize(
    ("method", "base", "panels"),
    [
        (lp.PromptTuning(length=5), "bert", [""]),
        (lp.PromptTuning(length=5, tasks=2), "bert", ["task 0", "task 1"]),
        (lp.MultitaskPromptTuning(length=5), "llama", [""]),
        (lp.PTuning(length=5), "bert", [""]),
        (lp.PrefixTuning(length=5), "llama", ["layer 0", "layer 1", "layer 2"]),
        (lp.PTuningV2(length=5), "bert", ["layer 0", "layer 1", "layer 2"]),
        (lp.LLaMAAdapter(length=5), "llama", [""]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, lp.Method) else None,
)
def test_similarities_are_cosines_of_each_prompt_or_layer(method, base, panels):
    model = adapted(method, base)
    found = [adapter.export_state() for *_, adapter in lp.adapters(model) if adapter.plot_tensors]
    all_tokens = [own["key"] if "key" in own else own["prompt"] for own in found]
    tokens = [one for x in all_tokens for one in x.reshape(-1, 5, x.shape[-1])]
    figure = plots.prompt_similarity(model)
    drawn = [axes for axes in figure.axes if axes.images and axes.get_visible()]
    assert [axes.get_title() for axes in drawn] == panels
    for axes, x in zip(drawn, tokens, strict=True):
        torch.testing.assert_close(
            torch.as_tensor(axes.images[0].get_array().data).double(), cosines(x), atol=1e-5, rtol=0
        )
        assert axes.images[0].get_clim() == (-1, 1)


class Tokenizer:
    def convert_ids_to_tokens(self, ids):
        return [f"$w{i}" if i % 2 else f"清{i}" for i in ids]


def test_virtual_tokens_are_named_by_the_nearest_word():
    model = lp.inject(MODELS["bert"](), lp.PromptTuning(length=3, tasks=2))
    table = model.get_input_embeddings().weight
    ids = [[7, 3, 8], [2, 2, 9]]
    (adapter,) = [one for *_, one in lp.adapters(model)]
    with torch.no_grad():
        adapter.prompt.copy_(2 * table[torch.tensor(ids)])  # farther away, in the same direction
    figure = plots.prompt_similarity(model, Tokenizer())
    first, second = (words(axes.get_yticklabels()) for axes in figure.axes[:2])
    assert first == ["$w7  0", "$w3  1", "\\u6e058  2"]  # the font has no such letter
    assert second == ["\\u6e052  0", "\\u6e052  1", "$w9  2"]
    figure.draw_without_rendering()
    prefixes = lp.inject(MODELS["bert"](), lp.PTuningV2(length=3))  # which are not among the embeddings
    assert words(plots.prompt_similarity(prefixes, Tokenizer()).axes[0].get_yticklabels()) == ["0", "1", "2"]


# Any adapters


@pytest.mark.parametrize(
    ("draw", "what"), [("rank_map", "triplets"), ("gate_map", "gates"), ("prompt_similarity", "virtual tokens")]
)
def test_a_picture_without_its_adapters_is_refused(draw, what):
    with pytest.raises(ValueError, match=f"No adapter of this model has {what}; adapt it with"):
        getattr(plots, draw)(lp.inject(MODELS["llama"](), lp.LoRA()))


def test_pictures_are_those_that_the_adapters_have_something_for():
    assert plots.pictures(MODELS["llama"]()) == {}
    assert plots.pictures(lp.inject(MODELS["llama"](), lp.LoRA())) == {}
    methods = [lp.AdaLoRA(initial_rank=4, target_rank=2), lp.PromptTuning(length=2), lp.LLaMAAdapter(length=3)]
    model = lp.inject(MODELS["llama"](), methods)
    assert list(plots.pictures(model)) == ["rank_map", "gate_map", "prompt_similarity"]


@pytest.mark.parametrize(
    ("method", "base"),
    [
        (lp.AdaLoRA(initial_rank=4, target_rank=2, targets=["attention.query"]), "gpt2"),
        ([lp.LLaMAAdapter(length=3, layers=2), lp.PromptTuning(length=2, tasks=2)], "llama"),
        (lp.PrefixTuning(length=3, name="my_own"), "t5"),
        ([lp.PromptTuning(length=2), lp.PTuning(length=3, name="second")], "bert"),
    ],
    ids=["parts", "two", "encoder-decoder", "one host"],
)
def test_a_folder_shows_what_the_model_shows(method, base, tmp_path):
    model = adapted(method, base)
    for *_, adapter in lp.adapters(model):
        if "ranks" in adapter.plot_tensors:
            adapter.kept[1:] = 0
            adapter.e.data[1:] = 0
    live, stored = PlotValues.of(model), PlotValues.stored(lp.save_adapter(model, tmp_path))
    assert stored.ranks == live.ranks
    for kind in ("gates", "tokens"):
        mine, other = getattr(live, kind), getattr(stored, kind)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert live.ranks or live.tokens


def test_layers_of_a_folder_are_in_order(tmp_path):
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)])
    lp.inject(model, lp.AdaLoRA(initial_rank=2, target_rank=1, targets=["*"]))
    assert list(PlotValues.stored(lp.save_adapter(model, tmp_path)).ranks) == [str(i) for i in range(12)]


def test_names_lose_what_all_of_them_share():
    assert shorten_names(["a.0.b.q", "a.1.b.q", "a.10.b.q"]) == ["0", "1", "10"]
    assert shorten_names(["a.x", "a.x.y"]) == ["x", "y"]
    assert shorten_names(["only.one"]) == ["only.one"]


@pytest.mark.slow
def test_nothing_is_cut_off(runs):
    method = lp.AdaLoRA(initial_rank=4, target_rank=2, targets=["*"])
    ranks = lp.inject(nn.ModuleDict({"a_long_name" * 3: nn.Linear(4, 4)}), method)
    drawn = [
        *plots.pictures(lp.inject(MODELS["t5"](), lp.PrefixTuning(length=20))).values(),
        *plots.pictures(lp.inject(MODELS["llama"](), lp.LLaMAAdapter(length=3))).values(),
        plots.prompt_similarity(lp.inject(MODELS["bert"](), lp.PromptTuning(length=100)), Tokenizer()),
        plots.rank_map(ranks),
        plots.learning_curves([runs / "lora", runs / "ia3"]),
        plots.accuracy_over_parameters(POINTS),
    ]
    for figure in drawn:
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        width, height = figure.get_size_inches()
        assert min(box.x0, box.y0, width - box.x1, height - box.y1) >= -0.01


# Files


def size_of(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


def test_files_are_png_of_the_figures_size_and_nothing_global_changes(tmp_path):
    before = dict(matplotlib.rcParams)
    figure = draw_gates({f"layers.{i}.attn": torch.randn(8) for i in range(4)})
    path = plots.save(figure, tmp_path / "new" / "gates.png")
    width, height = figure.get_size_inches()
    assert size_of(path) == (int(width * 150), int(height * 150))
    assert plots.save(figure, tmp_path / "gates.svg").read_text().startswith("<?xml")
    assert dict(matplotlib.rcParams) == before


def test_what_is_missing_is_named(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(ImportError, match=r"lightning-peft\[plots\]"):
        plots.gate_map(lp.inject(MODELS["llama"](), lp.LLaMAAdapter()))


# Runs


@pytest.fixture
def runs(tmp_path):
    """Two runs, one with two versions, as CSVLogger writes them."""

    def write(place, *rows):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        lines = ["epoch,step,train_loss_step,val_accuracy,val_loss", *rows]
        (folder / "metrics.csv").write_text("\n".join(lines) + "\n")

    write("lora/version_0", "0,9,9.0,,", "0,9,,0.1,9.0")
    write("lora/version_10", "0,4,2.0,,", "0,9,,0.5,1.5", "1,14,1.0,,", "1,19,,0.75,1.25")
    write("ia3/version_3", "0,9,,0.25,2.5")
    return tmp_path


def test_curves_are_what_the_newest_version_logged(runs):
    axes = plots.learning_curves([runs / "lora", runs / "ia3"], "val_loss").axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [[4, 2.0], [14, 1.0]],
        [[9, 1.5], [19, 1.25]],
        [[9, 2.5]],
    ]
    training, validation, other = axes.lines
    assert training.get_color() == validation.get_color() != other.get_color()
    assert training.get_linewidth() < validation.get_linewidth()
    assert axes.get_xlabel() == "optimizer step"
    legend = axes.figure.legends[0]
    assert words(legend.get_texts()) == ["lora", "ia3", "validation", "training"]


def test_one_run_and_versions_are_named(runs):
    figure = plots.learning_curves([runs / "lora"], "val_accuracy")
    assert figure.axes[0].get_title("left") == "lora: val_accuracy"
    assert not figure.legends
    figure.draw_without_rendering()
    assert all(label.endswith(" %") for label in words(figure.axes[0].get_yticklabels()))
    versions = plots.learning_curves([runs / "lora" / f"version_{i}" for i in (0, 10)], "val_accuracy")
    assert words(versions.legends[0].get_texts()) == ["version_0", "version_10"]
    assert plots.validated(runs / "ia3") == ["val_accuracy", "val_loss"]


def test_runs_without_the_metric_are_refused(runs):
    with pytest.raises(ValueError, match=r"ia3.*no metric 'val_acuracy'. Close names: val_accuracy"):
        plots.learning_curves([runs / "ia3"], "val_acuracy")
    with pytest.raises(ValueError, match=r"ia3.*no metric 'train_loss_step'. It has: val_accuracy, val_loss"):
        plots.learning_curves([runs / "lora", runs / "ia3"], "train_loss_step")
    (runs / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no metrics.csv. Expected the folder of a run"):
        plots.learning_curves([runs / "lora", runs / "empty"])
    (runs / "empty" / "metrics.csv").write_text("epoch,step,val_loss\n")
    with pytest.raises(ValueError, match="holds no values"):
        plots.learning_curves([runs / "empty"])
    with pytest.raises(ValueError, match="No run is given"):
        plots.learning_curves([])


# Accuracy over parameters

POINTS = {f"method_{i}": (150_000 * 1.1 ** (i % 7), 0.6 + 0.01 * (i % 5)) for i in range(16)} | {"all": (2e7, 0.7)}


def test_the_front_is_what_no_other_point_beats():
    points = {"a": (1, 0.5), "b": (2, 0.4), "c": (3, 0.5), "d": (4, 0.9), "e": (4, 0.8), "f": (9, 0.9)}
    assert pareto_front(points) == ["a", "d"]
    steps = next(line for line in plots.accuracy_over_parameters(points).axes[0].lines if len(line.get_xdata()) > 1)
    assert list(zip(*steps.get_data(orig=True), strict=True)) == [(1, 0.5), (4, 0.9), (9, 0.9)]


def test_points_stand_at_their_values_and_names_do_not_overlap():
    figure = plots.accuracy_over_parameters(POINTS, "test_accuracy")
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert (axes.get_xlabel(), axes.get_title("left")) == ("trained parameters", "test accuracy")
    shown = {tuple(line.get_xydata()[0]) for line in axes.lines if line.get_marker() == "o"}
    assert shown == set(POINTS.values())
    assert text_of(figure) == [name.replace("_", " ") for name in POINTS]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    inside = axes.get_window_extent()
    assert all(inside.contains(*box.min) and inside.contains(*box.max) for box in boxes)
    marks = [axes.transData.transform(point) for point in POINTS.values()]
    assert not any(box.contains(*mark) for box in boxes for mark in marks)


@pytest.mark.parametrize("points", [{"one": (5000, 0.5)}, {"one": (210e3, 0.5), "two": (400e3, 0.6)}])
def test_few_points_have_ticks_too(points):
    (axes,) = plots.accuracy_over_parameters(points).axes
    low, high = axes.get_xlim()
    assert sum(low <= tick <= high for tick in axes.get_xticks()) >= 2


def test_reports_are_read_from_the_folders_of_runs(tmp_path):
    for name, accuracy in (("lora", 0.5), ("ia3", 0.75)):
        folder = tmp_path / name / "version_0"
        folder.mkdir(parents=True)
        report = {"test_accuracy": accuracy, "trainable_parameters": len(name) * 1000, "checkpoint": "x.ckpt"}
        (folder / "report.json").write_text(json.dumps(report))
    figure = plots.accuracy_over_parameters([tmp_path / "lora", tmp_path / "ia3"])
    assert {tuple(line.get_xydata()[0]) for line in figure.axes[0].lines if line.get_marker() == "o"} == {
        (4000, 0.5),
        (3000, 0.75),
    }
    assert text_of(figure) == ["lora", "ia3"]
    with pytest.raises(ValueError, match="no metric 'test_acc'. Close names: test_accuracy"):
        plots.accuracy_over_parameters([tmp_path / "lora"], "test_acc")
    with pytest.raises(ValueError, match="at least one"):
        plots.accuracy_over_parameters({})
    assert figure.axes[0].get_title(loc="left") == "test accuracy"


def test_runs_that_were_not_tested_are_drawn_by_their_validation(tmp_path):
    for name, report in {"a": {"val_accuracy": 0.5}, "b": {"val_accuracy": 0.25, "test_accuracy": 0.75}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps({**report, "trainable_parameters": 10}))
    runs = [tmp_path / "a", tmp_path / "b"]
    axes = plots.accuracy_over_parameters(runs).axes[0]
    assert axes.get_title(loc="left") == "val accuracy"
    assert sorted(line.get_ydata()[0] for line in axes.lines if line.get_marker() == "o") == [0.25, 0.5]
    assert plots.accuracy_over_parameters(runs[1:]).axes[0].get_title(loc="left") == "test accuracy"
    with pytest.raises(ValueError, match=r"a/report.json has no metric 'test_accuracy'. Close names: val_accuracy"):
        plots.accuracy_over_parameters(runs, "test_accuracy")


# The command


def test_the_command_draws_runs(runs, tmp_path, capsys):
    target = tmp_path / "curves.png"
    main(["plot", "curves", str(runs / "lora"), str(runs / "ia3"), "--metric", "val_accuracy", "--output", str(target)])
    assert capsys.readouterr().out == f"{target}\n"
    assert size_of(target) == (1140, 570)
    (runs / "ia3" / "version_3" / "report.json").write_text('{"trainable_parameters": 5, "test_accuracy": 0.5}')
    target = tmp_path / "parameters.png"
    main(["plot", "parameters", str(runs / "ia3"), "--output", str(target)])
    assert size_of(target) == (1230, 735)
    with pytest.raises(SystemExit, match="lightning-peft: ValueError: .*Close names: val_loss"):
        main(["plot", "curves", str(runs / "ia3"), "--metric", "val_los"])


def test_the_command_draws_adapters(tmp_path, capsys):
    folder = lp.save_adapter(adapted(lp.LLaMAAdapter(length=3)), tmp_path / "adapter")
    main(["plot", "adapter", str(folder), "--output", str(tmp_path)])
    written = [tmp_path / "gate_map.png", tmp_path / "prompt_similarity.png"]
    assert capsys.readouterr().out.split() == [str(path) for path in written]
    assert all(min(size_of(path)) > 100 for path in written)
    plain = lp.save_adapter(lp.inject(MODELS["llama"](), lp.LoRA()), tmp_path / "plain")
    with pytest.raises(SystemExit, match="has nothing to draw"):
        main(["plot", "adapter", str(plain)])
