"""The record of an injection: its invariants hold after every public call, and it has one owner."""

import ast
import dataclasses
from pathlib import Path

import pytest
import torch
from models import MODELS, tokens

import lightning_peft as lp
from lightning_peft.core.adapted_module import AdaptedModule, method_name
from lightning_peft.core.injection_record import InjectionRecord, require_record
from lightning_peft.core.method_groups import active_methods
from lightning_peft.structure.base_model import base_parameters

ROOT = Path(lp.__file__).parent
FIELDS = {field.name for field in dataclasses.fields(InjectionRecord)}
OWNERS = {"record": "core/injection_record.py", "peft_order": "core/adapted_module.py"}


def written(path):
    """Return what a file assigns to, or changes in place, of a record or of a host's order."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        targets = []
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = [part for target in node.targets for part in ast.walk(target)]
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = list(ast.walk(node.target))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            changes = node.func.attr in ("append", "extend", "insert", "pop", "remove", "clear", "update", "setdefault")
            targets = [node.func.value] if changes else []
        for target in targets:
            if isinstance(target, ast.Attribute):
                if target.attr == "peft_order":
                    found.add("peft_order")
                if target.attr in FIELDS and "record" in ast.unparse(target.value):
                    found.add("record")
    return found


def test_records_and_orders_are_written_by_their_owners_alone():
    others = {
        (str(path.relative_to(ROOT)), name)
        for path in ROOT.rglob("*.py")
        for name in written(path)
        if str(path.relative_to(ROOT)) != OWNERS[name]
    }
    assert others == set()
    assert "peft_order" in written(ROOT / OWNERS["peft_order"])


def check_invariants(model):
    record = require_record(model)
    names = [method.name for method in record.methods]
    assert len(set(names)) == len(names)
    active = {method.name for method in active_methods(record)}
    assert active <= set(names)
    placed = [(host, key, adapter, method_name(key, adapter)) for _, host, key, adapter in lp.adapters(model)]
    assert {name for *_, name in placed} <= set(names)
    for host, key, adapter, name in placed:
        assert (key in host.peft_order) == (name in active)
        assert {p.requires_grad for p in adapter.parameters()} <= {name in active}
    trains = {name for name, parameter in base_parameters(model).items() if parameter.requires_grad}
    assert trains == set(record.trained)
    assert record.required_grad.keys() == base_parameters(model).keys()


STEPS = {
    "a second method": lambda model: lp.inject(model, lp.IA3()),
    "an inactive group": lambda model: lp.add_adapter(model, lp.LoRA(name="x", rank=2), also_train=["classifier"]),
    "switched": lambda model: lp.activate(lp.add_adapter(model, lp.LoRA(name="x", rank=2)), "x"),
    "both": lambda model: lp.activate(lp.add_adapter(model, lp.KronA(name="x")), "x", "lora"),
    "removed": lambda model: lp.remove_adapter(lp.add_adapter(model, lp.LoRA(name="x", rank=2)), "x"),
    "finalized": lambda model: lp.finalize(lp.inject(model, lp.PrefixTuning(length=2, hidden_size=4))),
}


@pytest.mark.parametrize("step", STEPS)
def test_invariants_hold_after_each_step(step):
    model = lp.inject(MODELS["bert"](), lp.LoRA(rank=2))
    check_invariants(model)
    STEPS[step](model)
    check_invariants(model)
    with lp.disabled(model):
        model(tokens())
    check_invariants(model)


def test_invariants_hold_with_a_trained_head_and_after_a_refusal():
    model = lp.inject(MODELS["bert"](), lp.LoRA(rank=2), also_train=["classifier"])
    check_invariants(model)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="Two methods are named 'lora'"):
        lp.inject(model, [lp.IA3(), lp.LoRA(rank=2)])
    check_invariants(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_detach_leaves_no_record_and_no_adapted_class():
    model = MODELS["bert"]()
    required = [p.requires_grad for p in model.parameters()]
    lp.detach(lp.inject(model, [lp.LoRA(rank=2), lp.Bottleneck(size=2)]))
    assert not [module for module in model.modules() if isinstance(module, AdaptedModule)]
    assert [p.requires_grad for p in model.parameters()] == required
    assert not [name for module in model.modules() for name in vars(module) if "peft" in name]
    assert torch.is_tensor(model(tokens()).logits)
