"""Steps on layers that are stored in 8 bits, which get their type back: below their adapters."""

import contextlib
import io

import lightning_peft as lp
from walks.checks import dtype_of
from walks.steps_weights import adopt_merged, mergeable


def merge_dequantized(walk):
    """The same after layers in 8 bits got their type back, with the values that they computed with."""
    state = walk.state
    if not state.quantized():
        return
    legal = mergeable(state, dequantize=True)
    if legal and not {host for placed in state.active_methods() for host in placed.hosts} & state.quantized():
        return  # nothing is dequantized then
    kept = state.copy()
    give_types_back(kept)
    new = kept.merged_base() if legal else {}
    with contextlib.redirect_stdout(io.StringIO()):  # it says how far the weights are from those before quantization
        done = walk.attempt(legal, lambda: lp.merge(walk.model, dequantize=True))
    if done is not None:
        give_types_back(state)
        adopt_merged(walk, new)
        state.clear()


def dequantize(walk):
    """Layers in 8 bits get their type back below their adapters."""
    state = walk.state
    if not state.merged and walk.attempt(bool(state.quantized()), lambda: lp.dequantize(walk.model)) is not None:
        give_types_back(state)


def give_types_back(state):
    for host in state.quantized():
        state.base[f"{host}.weight"] = state.value(f"{host}.weight").to(dtype_of(state))
        del state.base[f"{host}.scale"]


QUANTIZED_STEPS = {
    "merge(dequantize=True)": (lambda rng, walk: () if walk.state.quantized() else None, merge_dequantized, 6),
    "dequantize": (lambda rng, walk: () if walk.state.quantized() else None, dequantize, 3),
}
