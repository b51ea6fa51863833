"""LoRA on the experts of one block, beside the frozen block and beside peft's ``target_parameters``: time and memory.

    python benchmarks/experts.py --small

Each side runs in a process of its own, which says the median time of a step (forward and backward) and how far its peak
of memory rose during steps. Ratios are those of medians of rounds that take turns.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import harness
import torch
from torch import Tensor, nn

RANK = 8
SIDES = ("frozen", "lightning_peft", "peft")
IMPLEMENTATIONS = ("grouped_mm", "eager")
TARGETS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


class Block(nn.Module):
    """The experts of Mixtral under the name that they have in a block."""

    def __init__(self, implementation: str, small: bool) -> None:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        super().__init__()
        width, inner, experts = (64, 96, 8) if small else (512, 768, 64)
        config = MixtralConfig(
            hidden_size=width, intermediate_size=inner, num_local_experts=experts, num_experts_per_tok=2
        )
        config._experts_implementation = implementation
        self.mlp = nn.Module()
        self.mlp.experts = MixtralExperts(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02).requires_grad_(False)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.mlp.experts(x, index, weights)


def step_of(side: str, implementation: str, small: bool) -> Callable[[], None]:
    """Return forward and backward of one side."""
    torch.manual_seed(0)
    block = Block(implementation, small)
    experts, _, width = block.mlp.experts.gate_up_proj.shape
    tokens = 16 if small else 64
    x, index = torch.randn(tokens, width, requires_grad=True), torch.randint(0, experts, (tokens, 2))
    weights, call = torch.rand(tokens, 2), block
    if side == "lightning_peft":
        import lightning_peft as lp

        lp.inject(block, lp.LoRA(targets=["experts.up", "experts.down"], rank=RANK))
    elif side == "peft":
        import peft

        config = peft.LoraConfig(r=RANK, target_modules=[], target_parameters=list(TARGETS))
        call = peft.get_peft_model(block, config)

    def step() -> None:
        block.zero_grad()
        call(x, index, weights).square().sum().backward()

    return step


def answer_rounds(side: str, implementation: str, small: bool) -> None:
    """For each line of input, print the seconds of a step and the bytes by which memory has risen above the start."""
    step = step_of(side, implementation, small)
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    for _ in sys.stdin:
        begin = time.perf_counter()
        step()
        seconds = time.perf_counter() - begin
        risen = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024
        print(json.dumps([seconds, risen]), flush=True)


def measure(implementation: str, small: bool, rounds: int) -> dict[str, dict[str, float]]:
    """Return what each side says, asked in turns."""
    flags = ["--implementation", implementation, *(["--small"] if small else [])]
    sides = {
        side: subprocess.Popen(  # noqa: S603
            [sys.executable, __file__, "--side", side, *flags], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for side in SIDES
    }
    times, risen = {side: [] for side in SIDES}, dict.fromkeys(SIDES, 0)
    for _ in range(rounds):
        for side, process in sides.items():
            print(file=process.stdin, flush=True)
            seconds, risen[side] = json.loads(process.stdout.readline())
            times[side].append(seconds)
    for process in sides.values():
        process.communicate()
    return {
        side: {
            "milliseconds": round(1e3 * statistics.median(times[side]), 1),
            "ratio to frozen": round(harness.ratio(times, side, "frozen"), 2),
            "peak MB": round(risen[side] / 1e6, 1),
        }
        for side in SIDES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny block; results are not written")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return answer_rounds(options.side, options.implementation, options.small)
    results = {name: measure(name, options.small, options.rounds) for name in IMPLEMENTATIONS}
    for name, found in results.items():
        for side, row in found.items():
            print(f"{name:11} {side:15} {row}")
    if not options.small:
        harness.write(results, "experts")
    return None


if __name__ == "__main__":
    main()
