"""What is relied on of torch beyond its documented interface; each test says what breaks where one fails."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.overrides import TorchFunctionMode

from lightning_peft.ops import torch_api as api

REGISTER = {
    "forward": nn.Module.register_forward_hook,
    "forward_pre": nn.Module.register_forward_pre_hook,
    "state_dict": nn.Module.register_state_dict_post_hook,
    "load_state_dict_pre": nn.Module.register_load_state_dict_pre_hook,
}


def hook(*args):
    return None


@pytest.mark.parametrize("kind", REGISTER)
def test_hooks_are_found_in_a_module_and_its_copies_and_can_be_removed(kind):
    """Else merged models load silently, checkpoints hold the base, or torch's fast path stays off."""
    module = nn.Linear(2, 2)
    REGISTER[kind](module, hook)
    twin, loaded = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for each in (module, twin, loaded):
        assert list(api.hooks(each, kind).values()) == [hook]
        assert api.remove_hooks(each, kind, hook)
        assert not api.hooks(each, kind)
        assert not api.remove_hooks(each, kind, hook)


def test_each_write_raises_the_count_and_reading_does_not():
    """Else a cached weight, or a cached trunk, is used after it has changed."""
    x = torch.zeros(3)
    before = api.write_count(x)
    x.sum()
    assert api.write_count(x) == before
    x.add_(1)
    x[0] = 2
    assert api.write_count(x) > before
    with torch.no_grad():
        after = api.write_count(x)
        x.copy_(torch.ones(3))
    assert api.write_count(x) > after


@pytest.mark.parametrize("fake", [False, True])
def test_views_share_a_storage_and_other_tensors_do_not(fake):
    """Else the memory planner counts a tensor that is saved twice as two."""
    with FakeTensorMode() if fake else torch.no_grad():
        x, y = torch.zeros(4, 2), torch.zeros(4, 2)
        assert api.storage_key(x) == api.storage_key(x[1:].T)
        assert api.storage_key(x) != api.storage_key(y)


def test_values_of_tensors_are_joined_in_order():
    """Else AdaLoRA ranks triplets by the sensitivities of others."""
    assert api.flat([torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([5.0])]).tolist() == [1, 2, 3, 4, 5]


def test_a_process_knows_the_part_of_a_sharded_tensor_that_it_has(tmp_path):
    """Else fingerprints of sharded bases differ from those of whole ones."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.arange(6.0).view(3, 2), init_device_mesh("cpu", (1,)), [Shard(0)])
        assert api.local_part(sharded) == ((3, 2), (0, 0))
    finally:
        dist.destroy_process_group()


def test_compiling_a_module_in_place_is_seen():
    """Else the frozen cache cuts a part out of compiled code, which goes on to call it."""
    module = nn.Linear(2, 2)
    assert not api.is_compiled_in_place(module)
    module.compile()
    assert api.is_compiled_in_place(module)


def test_wrapped_tensors_are_told_from_plain_ones():
    """Else what is kept for inference belongs to a trace, or its memory is asked for and there is none."""
    assert api.is_plain(torch.ones(2))
    assert api.is_plain(nn.Parameter(torch.ones(2)))
    assert not api.is_plain(nn.Buffer(torch.ones(2)).as_subclass(type("Own", (torch.Tensor,), {})))
    with FakeTensorMode():
        assert not api.is_plain(torch.ones(2))
        assert not api.is_plain(nn.Parameter(torch.ones(2)))
    seen = []
    torch.func.vmap(lambda x: seen.append(api.is_plain(x)) or x)(torch.ones(2, 3))
    torch.func.grad(lambda x: seen.append(api.is_plain(x)) or x.sum())(torch.ones(3))
    assert seen == [False, False]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_is_noticed():
    """Else a trace holds a result that was kept, and not its computation."""
    seen = []
    torch.jit.trace(lambda x: seen.append(api.is_recorded()) or x + 1, torch.ones(2), check_trace=False)
    assert seen == [True]
    assert not api.is_recorded()


def test_hooks_of_a_module_and_of_all_modules_are_noticed():
    """Else projections of prompts that a hook changes are kept."""
    module = nn.Linear(2, 2)
    assert not api.has_hooks(module)
    for register in (
        module.register_forward_hook,
        module.register_forward_pre_hook,
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        handle = register(hook)
        assert api.has_hooks(module)
        handle.remove()
        assert not api.has_hooks(module)


def test_subclasses_of_tensors_are_computed_as_plain_ones():
    """Else tracing how a batch is used never ends."""

    class Counting(torch.Tensor):
        calls = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.calls += 1
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.ones(2).as_subclass(Counting)
    Counting.calls = 0
    with api.without_torch_function():
        assert type(x + 1) is torch.Tensor
    assert Counting.calls == 0


def test_functions_of_torch_can_be_called_inside_of_a_mode_that_intercepts_them():
    """Else tracing what feeds attention never ends, and prefixes do not reach eager attention."""
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    assert api.function_modes() == []
    with Mode() as mode:
        assert api.function_modes() == [mode]
        with api.without_function_modes():
            torch.add(x, 1)
        assert seen == []
        torch.add(x, 1)
    assert seen == [torch.add]


def test_a_transform_of_a_function_is_seen_while_it_runs():
    """Else transforms of ``torch.func`` refuse adapted layers, or each call of a layer binds a signature."""
    seen = []
    torch.func.grad(lambda x: (seen.append(api.in_function_transform()), x.sum())[1])(torch.ones(2))
    assert seen == [True]
    assert not api.in_function_transform()


def test_onednn_is_off_inside_and_as_before_outside():
    """Else the memory planner misses what an LSTM saves for backward."""
    before = torch._C._get_mkldnn_enabled()
    with api.without_onednn():
        assert not torch._C._get_mkldnn_enabled()
    assert torch._C._get_mkldnn_enabled() == before


def test_torchs_attention_reads_the_weights_that_are_taken_to_be_read():
    """Else adapters on torch's attention are refused, or do nothing."""
    from lightning_peft.structure.read_weights import read_bias_attribute, read_weight_attribute

    attention = nn.MultiheadAttention(4, 2)
    for module in (attention, attention.out_proj):
        assert isinstance(getattr(module, read_weight_attribute(type(module))), nn.Parameter)
        assert isinstance(getattr(module, read_bias_attribute(type(module))), nn.Parameter)
    called = []
    attention.out_proj.register_forward_hook(lambda *args: called.append(1))
    x = torch.randn(3, 1, 4)
    before = attention(x, x, x)[0]
    nn.init.zeros_(attention.out_proj.weight)
    assert not torch.equal(attention(x, x, x)[0], before)
    assert called == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_checkpointing_calls_again_is_wrapped_once(reentrant):
    """Else parts of a model are computed again in backward with the adapters of whoever calls backward."""
    from torch.utils import checkpoint

    lp_wrap = getattr(checkpoint, api._WRAPPED, None)
    api.wrap_checkpointed(lambda function: function)
    before = getattr(checkpoint, api._WRAPPED)
    api.wrap_checkpointed(None)
    assert getattr(checkpoint, api._WRAPPED) is before
    assert lp_wrap in (None, before)
    layer, x, calls = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True), []

    def part(x):
        calls.append(None)
        return layer(x).tanh()

    checkpoint.checkpoint(part, x, use_reentrant=reentrant).sum().backward()
    assert len(calls) == 2
    torch.testing.assert_close(x.grad, torch.autograd.grad(layer(x).tanh().sum(), x)[0])
