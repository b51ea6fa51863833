"""What a checkpoint costs beside its tensors: the same digests, names and findings, by fewer operators."""

import hashlib

import pytest
import torch
from counting import OperatorCount
from models import MODELS
from torch import nn

import lightning_peft as lp
from lightning_peft.checkpoints.adapter_state import frozen_names
from lightning_peft.core.fingerprint import digest, fingerprint, sample
from lightning_peft.core.nonfinite import check_finite
from lightning_peft.files.checksums import content_digest, settings_digest
from lightning_peft.structure.base_model import adapter_host, base_modules, base_parameters

TENSORS = {
    "vector": torch.arange(7.0),
    "parameter": nn.Parameter(torch.randn(3, 4)),
    "transposed": torch.randn(3, 4).T,
    "sliced": torch.randn(6, 4)[1::2],
    "offset": torch.randn(40)[5:9],
    "bfloat16": torch.randn(3, 4).bfloat16(),
    "bool": torch.tensor([True, False, True]),
    "integer": torch.tensor(12),
    "empty": torch.empty(0, 3),
    "complex": torch.randn(3, dtype=torch.complex64),
    "conjugated twice": torch.randn(3, dtype=torch.complex64).conj().resolve_conj(),
}


def digest_of_copies(settings, *contents):
    """The digest as each version has written it, by a copy of every tensor's bytes."""
    sha256 = hashlib.sha256(settings_digest(settings).encode())
    for number, content in enumerate(contents):
        for key, tensor in sorted((f"{number}/{key}", tensor) for key, tensor in content.items()):
            sha256.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha256.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


@pytest.mark.parametrize("name", TENSORS)
def test_a_digest_is_that_of_the_bytes_of_a_copy(name):
    settings, content = {"rank": 8}, {name: TENSORS[name], "other": torch.ones(2)}
    assert content_digest(settings, content) == digest_of_copies(settings, content)
    changed = {**content, "other": torch.tensor([1.0, 2.0])}
    assert content_digest(settings, changed) != content_digest(settings, content)


def test_a_digest_takes_no_operators_for_tensors_that_lie_in_memory_in_order():
    with OperatorCount() as count:
        content_digest({}, {name: TENSORS[name] for name in ("vector", "parameter", "bfloat16", "empty")})
    assert count.operators == {}


def mixed():
    """A base with types, places and shapes of all kinds."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(9, 9) for _ in range(5)), nn.BatchNorm1d(9))
    net[1].double()
    net[2].bfloat16()
    net[3].weight = nn.Parameter(torch.randn(9, 9).T)
    net[4].weight = nn.Parameter(torch.randn(200, 9)[20:29], requires_grad=False)
    return net


def test_a_fingerprint_is_that_of_each_parameter_by_itself():
    net = mixed().requires_grad_(False)
    alone = digest((tuple(p.shape), sample(p)) for p in base_parameters(net).values())
    values = {p: p.detach().reshape(-1)[:: max(1, p.numel() // 64)][:64].bfloat16() for p in net.parameters()}
    assert fingerprint(net) == alone == digest((tuple(p.shape), v) for p, v in values.items())


@pytest.mark.parametrize("layers", [3, 9])
def test_a_fingerprint_rounds_the_values_of_all_parameters_at_once(layers):
    net = nn.Sequential(*(nn.Linear(9, 9) for _ in range(layers))).requires_grad_(False)
    with OperatorCount() as count:
        fingerprint(net)
    views = {"detach": 2 * layers + 2, "as_strided": 2 * layers}
    assert count.operators["cat"] == 2  # of the values, and of what enters the digest
    assert count.operators["_to_copy"] == 1
    assert {name: count.operators[name] for name in views} == views


def frozen_by_definition(model):
    """Names of all that training cannot change, as torch lists it."""
    trained = {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    names = {n for n, _ in model.named_parameters(remove_duplicate=False)} - trained
    for name, module in base_modules(model).items():
        if not any(p.requires_grad for p in module.parameters(recurse=False)):
            names |= {f"{name}.{buffer}" for buffer, _ in module.named_buffers(recurse=False)}
    host_of = adapter_host(model)
    return {n for n in names if host_of(n) is None}


CASES = {
    "llama": (lambda: MODELS["llama"](), ["model.norm"]),
    "bert": (lambda: MODELS["bert"](), []),
    "batch norm that trains": (mixed, ["5"]),
    "batch norm that is frozen": (mixed, []),
}


@pytest.mark.parametrize("case", CASES)
def test_the_names_of_the_frozen_base_are_those_that_torch_lists(case):
    build, also_train = CASES[case]
    targets = ["0"] if build is mixed else ["attention.query"]
    model = lp.inject(build(), lp.LoRA(rank=2, targets=targets), also_train)
    found = frozen_names(model)
    assert found == frozen_by_definition(model)
    assert found
    assert not any(".peft." in name for name in found)


def test_what_is_finite_is_found_with_one_operator_for_all_tensors_and_the_rest_by_name():
    state = {str(number): torch.full((4,), float(number)) for number in range(50)} | {"count": torch.tensor(3)}
    with OperatorCount() as count:
        check_finite(state, "merged")
    assert count.operators["_foreach_norm"] == 1
    assert count.operators.total() == 50 + 8  # a detached view of each, and what is asked of all norms
    state["7"] = torch.full((4,), 3e38)  # whose norm is infinite
    check_finite(state, "merged")
    state["9"], state["12"] = torch.tensor([1.0, torch.nan]), torch.tensor([-torch.inf, 0])
    with pytest.raises(ValueError, match=r"merged from 9, 12 \(2 in all\)"):
        check_finite(state, "merged")
