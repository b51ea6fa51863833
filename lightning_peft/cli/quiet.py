"""``hide_known_messages`` leaves out lines of other libraries that tell a user of the command line nothing.

Each is known by its text, so that whatever else these libraries say is seen; ``--all_messages`` shows all.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings

# By logger: what a run repeats that its configuration, its progress or its result say, and what others say of their
# own parts. Nothing of this depends on what a user did.
_MESSAGES = {
    "lightning.fabric.utilities.seed": (r"Seed set to \d+$",),
    "lightning.pytorch.utilities.rank_zero": (
        r"(GPU|TPU|HPU|IPU) available: False",
        r"GPU available: True .*, used: True$",
        r"💡 Tip: ",
        r"Loading `train_dataloader` to estimate number of stepping batches\.$",
        r"`Trainer\.fit` stopped: `max_(epochs|steps)=\d+` reached\.$",
        r"LOCAL_RANK: 0 - CUDA_VISIBLE_DEVICES: ",
    ),
    "torchao": (r"Failed to load .*\.so: ",),
    "torchao.kernel.intmm": (r"Warning: Detected no triton",),
    "torch.utils._pytree": (r"<enum '\w+'> is an Enum subclass and is now natively supported",),
    "transformers.modeling_utils": (r"Some weights of \w+ were not initialized from the model checkpoint .*\['c",),
}
_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning calls what torch has deprecated
    r"Found \d+ module\(s\) in eval mode at the start of training",  # so frozen modules run, by PEFTStrategy
    r"Metric `SpearmanCorrcoef` will save all targets",
)
_REPORT = "LOAD REPORT"
_ROW = re.compile(r"^([\w.{}, ]+?)\s*\|\s*(MISSING|UNEXPECTED|MISMATCH\w*|CONVERSION\w*)\s*\|", re.MULTILINE)
_COLOR = re.compile(r"\x1b\[[0-9;]*m")  # on a terminal
_NEW_HEADS = ("classifier.", "score.", "qa_outputs.")


class KnownMessages(logging.Filter):
    """Leaves out what is known by its text.

    Args:
        patterns: Regular expressions for the beginnings of messages.
    """

    def __init__(self, patterns: tuple[str, ...]) -> None:
        super().__init__()
        self.patterns = [re.compile(pattern, re.DOTALL) for pattern in patterns]

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is shown."""
        text = record.getMessage()
        return not (any(pattern.match(text) for pattern in self.patterns) or only_heads_are_new(text))


def only_heads_are_new(text: str) -> bool:
    """Return whether a text is transformers' report of a load in which nothing is missing but a new classifier."""
    if _REPORT not in text:
        return False
    rows = _ROW.findall(_COLOR.sub("", text))
    expected = [state == "UNEXPECTED" or (state == "MISSING" and key.startswith(_NEW_HEADS)) for key, state in rows]
    return bool(rows) and all(expected)


def hide_known_messages() -> None:
    """Leave known messages out in this process, and in those that it starts; progress bars too where nobody looks."""
    for name, patterns in _MESSAGES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, KnownMessages) for known in logger.filters):
            logger.addFilter(KnownMessages(patterns))
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if (loaded := sys.modules.get("transformers.utils.logging")) is not None:  # it has read the environment
            loaded.disable_progress_bar()
