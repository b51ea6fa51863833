"""python benchmarks/activation_space.py: IA3, adapters, prefixes and prompts beside HF peft.

Writes results/activation_space.json. Each part can run again alone (--only, --models, --methods): its numbers replace
the old ones in the file. With --small the sizes are tiny, the numbers mean nothing, and nothing is written.
"""

import itertools
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from operator import attrgetter

import harness
import rows
import torch
from rows import Row
from sides import Case, compare, ours, pattern, peer
from torch import Tensor, nn

import lightning_peft as lp

KEY_VALUE = {"bert": ["key", "value"], "llama": ["k_proj", "v_proj"]}
DOWN = {"bert": ["*[0-9].output.dense"], "llama": ["down_proj"]}
SCALED = {kind: [*KEY_VALUE[kind], *DOWN[kind]] for kind in DOWN}
LENGTH, TASKS = 20, 4
TASK_TYPE = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}
PEFT_TOKENS = {"num_virtual_tokens": LENGTH, "task_type": TASK_TYPE}


def task_ids(batch: harness.Batch) -> Tensor:
    return torch.arange(len(batch["labels"])) % TASKS


def our_tasks(model: nn.Module, batch: harness.Batch) -> Tensor:
    with lp.row_tasks(model, task_ids(batch)):
        return harness.loss(model, batch)


def peft_tasks(model: nn.Module, batch: harness.Batch) -> Tensor:
    return model(**batch, task_ids=task_ids(batch)).loss


def more_gates(config: object) -> int:
    """Ours has a gate for each head, as the paper has; peft one for each layer."""
    return config.num_hidden_layers * (config.num_attention_heads - 1)


# What no weight absorbs has no goal to the floor in eval.
Live = partial(Case, eval_goal=None)
Prompt = partial(Live, floor_goal=1.05, peft_goal=0.95, added=LENGTH)
IA3 = ours("IA3")  # the same places by role; of a gated block the other up-projection is scaled, the same function
PEFT_IA3 = peer("IA3Config", target_modules=pattern(SCALED), feedforward_modules=pattern(DOWN))
BITFIT = ours("BitFit", add_missing={"bert": False, "llama": True})
# No norms and no head, which the papers train as well: the figures are those of the adapters.
BOTTLENECK = ours("Bottleneck", size=64, train_norms=False, train_head=False)
ONE = {"size": 24, "activation": "relu", "targets": ["feedforward.down"]}  # after the feed-forward block alone
BOTTLENECK_ONE = ours("Bottleneck", **ONE, train_norms=False, train_head=False)
PREFIX = peer("PrefixTuningConfig", **PEFT_TOKENS)
PREFIX_MLP = peer("PrefixTuningConfig", **PEFT_TOKENS, prefix_projection=True, encoder_hidden_size=512)
PREFIXED = ("llama",)  # peft 0.21 refuses prefixes on classifiers with transformers 5.24
BLOCKS = attrgetter("num_hidden_layers")  # all of them, since gradients flow through all of the floor
LLAMA_ADAPTER = ours("LLaMAAdapter", length=10, layers=BLOCKS)
ADAPTION = peer("AdaptionPromptConfig", adapter_len=10, adapter_layers=BLOCKS)
# The sizes of the authors' encoder: both directions of the LSTM together are as wide as an embedding.
HALF = {"encoder_hidden_size": lambda config: config.hidden_size // 2, "encoder_num_layers": 2}
ENCODER = peer("PromptEncoderConfig", **PEFT_TOKENS, encoder_reparameterization_type="LSTM", **HALF)
MULTITASK = ours("MultitaskPromptTuning", length=LENGTH, tasks=TASKS)
PEFT_MULTITASK = peer("MultitaskPromptTuningConfig", **PEFT_TOKENS, num_tasks=TASKS, prompt_tuning_init="RANDOM")
CASES = {
    "ia3": Case(IA3, PEFT_IA3, 1.05, 1.00, 0.88),
    "bitfit": Case(BITFIT, None, 1.05),
    "bottleneck": Live(BOTTLENECK, None, 1.05),
    "bottleneck_one": Live(BOTTLENECK_ONE, None, 1.05),
    "parallel_adapter": Live(ours("ParallelAdapter", size=64), None, 1.05),
    "prefix": Live(ours("PrefixTuning", length=LENGTH, reparameterize=False), PREFIX, 1.05, 1.00, peer_on=PREFIXED),
    "p_tuning_v2": Live(
        ours("PTuningV2", length=LENGTH, dropout=0.0, train_head=False), PREFIX, 1.05, 1.00, peer_on=PREFIXED
    ),
    "prefix_mlp": Live(ours("PrefixTuning", length=LENGTH, hidden_size=512), PREFIX_MLP, None, 1.00, peer_on=PREFIXED),
    "llama_adapter": Live(LLAMA_ADAPTER, ADAPTION, 1.05, 0.90, peer_on=("llama",), surplus=more_gates),
    "prompt_tuning": Prompt(ours("PromptTuning", length=LENGTH), peer("PromptTuningConfig", **PEFT_TOKENS)),
    "p_tuning": Prompt(ours("PTuning", length=LENGTH, encoder="lstm"), ENCODER),
    "multitask_prompt_tuning": Prompt(MULTITASK, PEFT_MULTITASK, calls={"ours": our_tasks, "peft": peft_tasks}),
}


def run(options: Namespace) -> Iterator[Row]:
    for kind, name in itertools.product(options.models, options.methods):
        yield from ((part, kind, name, row) for part, row in compare(kind, CASES[name], options))


if __name__ == "__main__":
    choices = {"only": ["train", "eval", "bytes"], "models": list(harness.MODELS), "methods": list(CASES)}
    rows.main("activation_space", __doc__, choices, run)
