"""What a model must hold after each step of a walk, and a digest that shows whether a refusal changed anything."""

import torch

import lightning_peft as lp
from walks.methods import tensor_names
from walks.nets import ALIASES, NETS, inputs

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 0.15}


class Violation(Exception):
    """The model and the oracle differ."""


def require(condition, said):
    if not condition:
        raise Violation(said() if callable(said) else said)


def close(found, expected, what, dtype):
    expected = expected.detach().double()
    error = (found.detach().double() - expected).abs().max().item()
    limit = TOLERANCE[dtype] * max(1.0, expected.abs().max().item())
    require(error <= limit, f"{what} is {error:.3g} off")


def dtype_of(state):
    return next(t.dtype for t in state.base.values() if t.is_floating_point())


def accuracy(state):
    """The type whose rounding results have: that of the base, or of a narrower adapter, as those on 8 bits are."""
    tensors = [t for placed in state.methods for by_key in placed.hosts.values() for t in by_key.values()]
    types = [dtype_of(state), *(t.dtype for t in tensors if t.is_floating_point())]
    return min(types, key=lambda dtype: torch.finfo(dtype).bits)


def fed(state, x=None):
    x = inputs(state.net) if x is None else x
    return x.to(dtype_of(state)) if x.is_floating_point() else x


def check(model, state):
    """Raise a ``Violation`` where a model is not what a state says."""
    check_tensors(model, state)
    check_names(model, state)
    expected = state.output()
    with torch.no_grad():
        close(model(fed(state)), expected, "the output without gradients", accuracy(state))
    close(model(fed(state)), expected, "the output with gradients", accuracy(state))


def check_tensors(model, state):
    shown = model.state_dict()
    aliases = ALIASES.get(state.net, {})
    expected = set(state.base) | set(aliases)
    for placed in state.methods:
        for host, tensors in placed.hosts.items():
            names = tensor_names(placed.spec, host, state.base)
            require(set(tensors) == names, f"{placed.name} at {host} has {sorted(tensors)}, not {sorted(names)}")
            expected |= {f"{host}.peft.{placed.name}.{key}" for key in tensors}
            for key, value in tensors.items():
                now = shown[f"{host}.peft.{placed.name}.{key}"]
                require(now.dtype == value.dtype and torch.equal(now, value), f"{placed.name}.{key} at {host} changed")
    require(shown.keys() == expected, lambda: f"keys differ: {sorted(shown.keys() ^ expected)}")
    for name, value in state.base.items():
        same = shown[name].dtype == value.dtype and torch.equal(bits(shown[name]), bits(value))
        require(same, f"{name} of the base changed")


def check_names(model, state):
    active = {placed.name for placed in state.active_methods()}
    for name, p in model.named_parameters():
        host, inside, rest = name.partition(".peft.")
        wanted = rest.split(".")[0] in active if inside else state.trained
        if not inside:
            wanted = name in state.trained if state.injected else state.required.get(name, False)
        hidden = state.merged and not inside and name not in state.base
        require(hidden or p.requires_grad == wanted, f"requires_grad of {name} is {p.requires_grad}")
    hosts = {host for placed in state.methods for host in placed.hosts}
    for name, module in model.named_modules():
        if "peft" not in name.split("."):
            adapted = hasattr(type(module), "_host_class")
            require(adapted == (name in hosts), f"{name} is of class {type(module)}")
    require(state.injected == ("_peft_injection" in vars(model)), "there is a record, or none")
    if state.injected:
        require(lp.active(model) == tuple(state.active), lambda: f"active are {lp.active(model)}, not {state.active}")
    else:
        names = [name for module in model.modules() for name in vars(module) if name != "_peft_original"]
        left = [name for name in names if "peft" in name]
        hooks = [
            m for m in model.modules() if m._forward_pre_hooks or m._state_dict_hooks or m._load_state_dict_pre_hooks
        ]
        require(not left and not hooks, f"{left} and hooks of {len(hooks)} modules are left")
        require(type(model) is NETS[state.net][0], f"the model is a {type(model)}")


def bits(tensor):
    views = {8: torch.int64, 4: torch.int32, 2: torch.int16}
    return tensor.view(views[tensor.element_size()]) if tensor.is_floating_point() else tensor


def digest(model):
    """Everything about a model that a refused call could change."""
    modules = [
        (name, type(m), m.training, sorted(vars(m)), getattr(m, "peft_order", None), sorted(m._modules))
        + tuple(len(getattr(m, f"_{kind}_hooks")) for kind in ("forward_pre", "state_dict", "load_state_dict_pre"))
        for name, m in model.named_modules()
    ]
    tensors = {
        name: (id(t), t.dtype, t.requires_grad, bits(t.detach().contiguous()).numpy().tobytes() if t.numel() else b"")
        for name, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    }
    return modules, tensors, repr(vars(model).get("_peft_injection"))
