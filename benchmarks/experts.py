"""LoRA on the experts of one block, beside the frozen block and beside peft's ``target_parameters``: time and memory.

    python benchmarks/experts.py --small

Times are of steps (forward and backward) that take turns in one process, and ratios are medians. How far the peak of
memory rises during steps is measured in a process for each side.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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


def print_risen_memory(side: str, implementation: str, small: bool) -> None:
    """Print the bytes by which memory rises above the start during three steps."""
    step = step_of(side, implementation, small)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak, which may be that of a parent, to what is now
    start = peak_memory()
    for _ in range(3):
        step()
    print(peak_memory() - start)


def peak_memory() -> int:
    """Return the most bytes that this process has had in memory; Linux tells them."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def risen_memory(side: str, implementation: str, small: bool) -> int:
    """Return what a process for one side prints."""
    flags = ["--side", side, "--implementation", implementation, *(["--small"] if small else [])]
    command = [sys.executable, __file__, *flags]
    result = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    return int(result.stdout)


def measure(implementation: str, risen: dict[str, int], small: bool, rounds: int, budget: float) -> dict[str, dict]:
    """Return the times of all sides, which take turns in this process, beside their memory."""
    times = harness.paired({side: step_of(side, implementation, small) for side in SIDES}, rounds, budget)
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
    parser.add_argument("--budget", type=float, default=60, help="seconds for each implementation")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return print_risen_memory(options.side, options.implementation, options.small)
    risen = {name: {side: risen_memory(side, name, options.small) for side in SIDES} for name in IMPLEMENTATIONS}
    settings = options.small, options.rounds, options.budget
    results = {name: measure(name, risen[name], *settings) for name in IMPLEMENTATIONS}
    for name, found in results.items():
        for side, row in found.items():
            print(f"{name:11} {side:15} {row}")
    if not options.small:
        harness.write(results, "experts")
    return None


if __name__ == "__main__":
    main()
