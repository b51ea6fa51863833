"""Adapters of third parties, written against ``lightning_peft.core`` alone: right on every layer, or refused."""

import ast
import copy
import dataclasses
import functools
import pickle
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from cases import Case
from lightning.pytorch.callbacks import ModelCheckpoint
from models import MODELS, logits, tokens
from parallel_laws import Keep, Task, difference, fit, gradients_alone, resumed
from processes import together
from torch import nn
from trainer_models import Module, data, trainer

import lightning_peft as lp
from examples.oft import OFT
from examples.own_method import VeRA
from lightning_peft.core import LinearType, layer_of, parameter_like, select

EXAMPLES = Path(__file__).parents[2] / "examples"
ON = {  # models, and targets there: weights that are called, fused, stored transposed, and read by torch's attention
    "llama": ["attention.query", "attention.value"],
    "bert": ["all-linear"],
    "gpt2": ["attention.query", "attention.value"],
    "gpt2, whole": ["c_attn", "c_proj"],
    "encoder": ["attention.query", "attention.output"],
}
METHODS = {"OFT": functools.partial(OFT, block_size=4), "VeRA": functools.partial(VeRA, rank=3)}


def build(on, kind, train=False):
    torch.manual_seed(1)
    model = MODELS[on.partition(",")[0]]()
    lp.inject(model, METHODS[kind](targets=ON[on]))
    generator = torch.Generator().manual_seed(2)
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.train(train)


def run(model):
    return logits(model(tokens()))


@pytest.fixture(params=[(on, kind) for on in ON for kind in METHODS], ids=lambda pair: "-".join(pair))
def pair(request):
    return request.param


def test_merged_equals_live_and_differs_from_the_base(pair):
    on, _ = pair
    model = build(*pair)
    base, live = MODELS[on.partition(",")[0]]().eval(), None
    base.load_state_dict({k: v for k, v in model.state_dict().items() if ".peft." not in k})
    live = run(model)
    assert (live - run(base)).abs().max() > 1e-3
    torch.testing.assert_close(run(lp.merge(model)), live, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", METHODS)
def test_a_role_changes_the_rows_of_its_part_alone(kind):
    torch.manual_seed(0)
    model = lp.inject(MODELS["gpt2"](), METHODS[kind](targets=["attention.query"]))
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
    host = model.get_submodule(next(name for name, *_ in lp.adapters(model)))
    x, width = torch.randn(4, host.weight.shape[0]), host.weight.shape[0]
    change = host(x) - (x @ host.weight + host.bias)
    assert change[:, :width].abs().max() > 1e-2
    assert torch.equal(change[:, width:], torch.zeros_like(change[:, width:]))


def test_files_bring_it_back(pair, tmp_path):
    model = build(*pair)
    lp.save_adapter(model, tmp_path)
    torch.manual_seed(1)
    again = lp.load_adapter(MODELS[pair[0].partition(",")[0]](), tmp_path).eval()
    torch.testing.assert_close(run(again), run(model), atol=0, rtol=0)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.testing.assert_close(run(twin), run(model), atol=0, rtol=0)


def test_oft_is_its_formula_and_rotates():
    host = nn.Linear(8, 6)
    model = lp.inject(nn.Sequential(host), OFT(targets=["0"], block_size=4))
    ((_, _, _, adapter),) = lp.adapters(model)
    nn.init.normal_(adapter.q)
    skew = (adapter.q - adapter.q.mT).detach().double()
    blocks = [torch.linalg.inv(torch.eye(4) + s) @ (torch.eye(4) - s) for s in skew]
    rotation = torch.block_diag(*blocks)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(8, dtype=torch.float64))
    x = torch.randn(3, 8)
    expected = x.double() @ (host.weight.double() @ rotation).T + host.bias.double()
    torch.testing.assert_close(model(x).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", METHODS)
def test_it_works_on_convolutions_and_embeddings_or_says_no(kind):
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 4))
    x = torch.randint(9, (2, 3))
    lp.inject(model, METHODS[kind](targets=["0", "1"]) if kind == "VeRA" else OFT(targets=["1"], block_size=4))
    for *_, adapter in lp.adapters(model):
        for parameter in adapter.parameters():
            nn.init.normal_(parameter)
    live = model(x)
    torch.testing.assert_close(lp.merge(model)(x), live, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", METHODS)
def test_it_compiles_whole(kind):
    model = build("llama", kind)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens())
    torch.testing.assert_close(logits(found), run(model), atol=1e-5, rtol=1e-5)


class OneEpoch(pl.Callback):
    """Ends a run after its first epoch, which the run itself does not know beforehand."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = True


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
@pytest.mark.parametrize("kind", METHODS)
def test_a_resumed_run_equals_the_uninterrupted_one(kind, tmp_path):
    def fitted(*callbacks, path=None):
        pl.seed_everything(7, verbose=False)
        module = Module("llama")
        strategy = lp.PEFTStrategy(METHODS[kind](), show_summary=False)
        trainer(strategy, *callbacks, epochs=2).fit(module, data(shuffle=True), ckpt_path=path)
        return module.state_dict()

    expected = fitted()
    fitted(OneEpoch(), ModelCheckpoint(tmp_path, save_last=True))
    found = fitted(path=tmp_path / "last.ckpt")
    assert found.keys() == expected.keys()
    assert [key for key in found if ".peft." in key]
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def test_yaml_builds_it_by_its_class_path(tmp_path):
    from lightning_peft.cli.parser import PEFTParser

    parser = PEFTParser()
    parser.add_argument("--method", type=lp.Method)
    path = tmp_path / "m.yaml"
    path.write_text("method: {class_path: examples.oft.OFT, init_args: {block_size: 2, targets: [query]}}")
    method = parser.instantiate_classes(parser.parse_path(path)).method
    assert method == OFT(block_size=2, targets=["query"])


@dataclass(frozen=True, kw_only=True)
class Careless(lp.Method):
    """Knows nothing of rows and of weights that are read."""

    name: str = "careless"
    targets: list[str] = dataclasses.field(default_factory=lambda: ["attention.query"])
    kind: type = nn.Module

    def adapters(self, model):
        return ((name, self.kind(host)) for name, host, _ in select(model, self.targets))


class Gain(lp.WeightUpdate):
    def __init__(self, host):
        super().__init__(host)
        self.gain = parameter_like(self.layer.parameter(host), 1)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.gain, 0.5)

    def updated(self, weight):
        return weight * self.gain


class Gate(lp.Adapter):
    def __init__(self, host):
        super().__init__()
        self.gate = nn.Parameter(torch.ones(1))

    def reset_parameters(self):
        nn.init.ones_(self.gate)

    def forward(self, host, inner, *args, **kwargs):
        return inner(*args, **kwargs)


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("gpt2", Gain, "Gain changes all rows of .*c_attn.* mean the rows query 0:"),
        ("gpt2", Gate, "Gate changes all rows of .*c_attn.* mean the rows query 0:"),
        ("encoder", Gain, "Gain changes all rows of .*self_attn.* mean the rows query 0:"),
        ("encoder", Gate, "Gate surrounds the call of .*self_attn"),
    ],
)
def test_who_ignores_rows_or_read_weights_is_refused_before_anything_changed(model, kind, message):
    net = MODELS[model]()
    required = [p.requires_grad for p in net.parameters()]
    with pytest.raises((TypeError, ValueError), match=message):
        lp.inject(net, Careless(kind=kind))
    assert not list(lp.adapters(net))
    assert [p.requires_grad for p in net.parameters()] == required


class MergedGate(Gate):
    """A gate that merges as that of a linear layer."""

    def forward(self, host, inner, *args, **kwargs):
        y = inner(*args, **kwargs)
        return (y[0] * self.gate, *y[1:]) if isinstance(y, tuple) else y * self.gate

    def merge(self, host):
        layer = layer_of(host)
        layer.write(host, layer.read(host) * self.gate)
        layer.write_bias(host, layer.bias(host) * self.gate)


@pytest.mark.parametrize(("name", "targets"), [("gpt2", ["all-linear"]), ("encoder", ["self_attn"])])
def test_a_surrounding_adapter_is_merged_right_or_refused(name, targets):
    """On all of GPT-2's c_attn it would be three adapters of one name; the output of torch's attention is no weight."""
    net = MODELS[name]().eval()
    before, base = {key: value.clone() for key, value in net.state_dict().items()}, run(net)
    if name == "gpt2":
        with pytest.raises(
            ValueError, match=r"Two adapters 'careless' go to transformer.h.0.attn.c_attn.*select_modul"
        ):
            lp.inject(net, Careless(kind=MergedGate, targets=targets))
        assert not list(lp.adapters(net))
        lp.inject(net, Careless(kind=MergedGate, targets=["c_attn", "mlp.c_proj"]))
    else:
        lp.inject(net, Careless(kind=MergedGate, targets=targets))
    for *_, adapter in lp.adapters(net):
        nn.init.constant_(adapter.gate, 0.5)
    live = run(net)
    assert (live - base).abs().max() > 1e-2
    if name == "gpt2":
        torch.testing.assert_close(run(lp.merge(net)), live, atol=1e-5, rtol=1e-5)
        return
    for options in ({}, {"keep": True}):
        with pytest.raises(TypeError, match="MergedGate changes what MultiheadAttention returns, and its merge would"):
            lp.merge(net, **options)
    after = net.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    torch.testing.assert_close(run(net), live, atol=0, rtol=0)


def test_who_ignores_rows_is_right_where_there_are_none_or_a_glob_means_all():
    for targets, name in ((["attention.query"], "llama"), (["c_attn"], "gpt2"), (["linear1"], "encoder")):
        net = lp.inject(MODELS[name](), Careless(kind=Gain, targets=targets)).eval()
        live = run(net)
        torch.testing.assert_close(run(lp.merge(net)), live, atol=1e-5, rtol=1e-5)


def test_an_update_of_any_weight_cannot_share_it_and_needs_one_definition():
    class Empty(lp.WeightUpdate):
        def reset_parameters(self):
            """There is nothing to fill."""

    net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"Empty must define delta\(\), updated\(weight\) or updated_bias"):
        Empty(net[0])
    with pytest.raises(ValueError, match="Gain at 0 rewrites the whole weight"):
        lp.inject(net, [lp.LoRA(rank=2, targets=["0"]), Careless(kind=Gain, targets=["0"])])


def test_examples_import_the_public_names_alone_and_are_short():
    for name in ("oft.py", "own_method.py"):
        text = (EXAMPLES / name).read_text()
        found = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
        assert {module for module in found if module.startswith("lightning_peft")} == {"lightning_peft.core"}
    method, _, _ = (EXAMPLES / "oft.py").read_text().partition('\nif __name__ == "__main__":')
    assert len(method.splitlines()) <= 50


CASES = [Case("llama", (OFT(block_size=4),)), Case("llama", (VeRA(rank=3),)), Case("gpt2", (OFT(block_size=4),))]


def _sharded(folder):
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    found = []
    for number, case in enumerate(CASES):
        torch.manual_seed(1)
        keep = Keep()
        fit(case, lp.FSDP2Strategy, keep, make=Task, max_steps=1)
        torch.manual_seed(1)
        off = difference(keep.gradients, gradients_alone(case))
        found.append((str(case), off, resumed(case, lp.FSDP2Strategy, Path(folder, str(number)))))
    return found


@pytest.mark.slow
def test_fsdp2_shards_it_over_two_processes(tmp_path):
    for rank in together(_sharded, str(tmp_path)):
        assert len(rank) == len(CASES)
        for name, off, differing in rank:
            assert off < 1e-5, name
            assert differing == [], name


class Product(nn.Linear):
    """Its weight is computed: W = 2 W_stored."""


class ProductType(LinearType):
    def read(self, host):
        return 2 * host.weight


def test_a_layer_type_that_computes_its_weight_and_cannot_write_it_refuses_to_merge():
    layer_of.register(Product)(lambda host: ProductType())
    model = lp.inject(nn.Sequential(Product(4, 4)), lp.LoRA(rank=2, targets=["0"]))
    with pytest.raises(TypeError, match="The weight of Product is computed; its layer type has to override write"):
        lp.merge(model)


@pytest.mark.parametrize("keep", [False, True])
def test_a_merge_that_one_class_of_layers_refuses_leaves_all_layers_as_they_were(keep):
    layer_of.register(Product)(lambda host: ProductType())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Product(4, 4))
    lp.inject(model, lp.LoRA(rank=2, targets=["0", "1", "2"]))
    for *_, adapter in lp.adapters(model):
        nn.init.normal_(adapter.b)
    x, before = torch.randn(3, 4), {key: value.clone() for key, value in model.state_dict().items()}
    live = model(x)
    with pytest.raises(TypeError, match="has to override write"):
        lp.merge(model, keep=keep)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    torch.testing.assert_close(model(x), live, atol=0, rtol=0)
    assert len(list(lp.adapters(model))) == 3
