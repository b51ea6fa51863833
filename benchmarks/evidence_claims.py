"""Claims of the methods' papers, and what the runs of results/evidence.json say to them."""

from dataclasses import dataclass
from math import isfinite

from evidence_summary import DECODER, SETS, Runs, differences, interval, title

MARGIN, LOSS_MARGIN = 0.01, 0.02  # what "on par" leaves open: of accuracy, and of the loss


@dataclass(frozen=True)
class Claim:
    """That a method is above another one, or on par with it: not below it by more than the margin."""

    text: str
    method: str
    other: str
    on_par: bool = False
    decoder_only: bool = False  # the configurations for the encoder differ in more than the claim says


CLAIMS = [
    Claim("LoRA is on par with full fine-tuning (Hu and others, table 2)", "lora", "full_fine_tuning", True),
    Claim("DoRA is better than LoRA (Liu and others)", "dora", "lora"),
    Claim("AdaLoRA is better than LoRA at an equal budget (Zhang and others)", "adalora", "lora"),
    Claim(
        "QLoRA: 4 bits lose nothing against full fine-tuning (Dettmers and others)",
        "qlora", "full_fine_tuning", True,
    ),
    Claim("QLoRA: 4 bits lose nothing against LoRA on a plain base", "qlora", "lora", True, True),
    Claim("KronA is better than LoRA (Edalati and others)", "krona", "lora"),
    Claim("KronA^B is better than KronA", "krona_block", "krona"),
    Claim("KronA^B_res is better than KronA^B", "krona_block_residual", "krona_block"),
    Claim("FedPara, of up to full rank, is better than a low-rank update (Hyeon-Woo and others)", "fedpara", "lora"),
    Claim(
        "BitFit is on par with full fine-tuning on small sets (Ben Zaken and others)",
        "bitfit", "full_fine_tuning", True,
    ),
    Claim(
        "Adapters are within 0.4 % of full fine-tuning (Houlsby and others)",
        "bottleneck", "full_fine_tuning", True,
    ),
    Claim("Parallel adapters are better than sequential ones (He and others)", "parallel_adapter", "bottleneck"),
    Claim("MAM adapters are better than their parallel adapters alone", "mam", "parallel_adapter"),
    Claim("MAM adapters are better than their prefixes alone", "mam", "prefix_tuning"),
    Claim(
        "Prefixes through a perceptron are better than prefixes trained directly (Li and Liang)",
        "prefix_tuning", "p_tuning_v2",
    ),
    Claim(
        "P-tuning v2 is better than prompt tuning with small models (Liu and others)",
        "p_tuning_v2", "prompt_tuning",
    ),
    Claim(
        "Prompt tuning is behind full fine-tuning with small models (Lester and others, figure 1)",
        "full_fine_tuning", "prompt_tuning",
    ),
    Claim("An encoder of prompts is better than prompts trained directly (P-tuning)", "p_tuning", "prompt_tuning"),
    Claim("(IA)³ is better than full fine-tuning with few examples (Liu and others)", "ia3", "full_fine_tuning"),
    Claim("LLaMA-Adapter V2 is better than version 1 (Gao and others)", "llama_adapter_2", "llama_adapter"),
    Claim("LLaMA-Adapter is on par with full fine-tuning (Alpaca)", "llama_adapter", "full_fine_tuning", True),
    Claim(
        "Fine-tuning is better than features of the first token (a bracket, no paper)",
        "full_fine_tuning", "features",
    ),
]  # fmt: skip


def verdict(claim: Claim, center: float, half: float, margin: float) -> str:
    """Return what an interval says: holds, does not hold, or not decided."""
    wanted = -margin if claim.on_par else 0.0
    if center - half > wanted:
        return "holds"
    return "does not hold" if center + half < wanted else "not decided"


def lines(runs: Runs) -> list[list[str]]:
    """Return the rows of a table: the claim, the difference with its interval, the number of pairs, the verdict."""
    found = [["claim", "measured here", "difference (95 % interval)", "pairs", "verdict"]]
    for claim in CLAIMS:
        for where, sets in {"accuracy, points": list(SETS), "test loss, E2E": [DECODER]}.items():
            groups = differences(runs, claim.method, claim.other, sets)
            if not groups or (claim.decoder_only and sets != [DECODER]):
                continue
            unit, digits, margin = (100, 1, MARGIN) if sets != [DECODER] else (1, 3, LOSS_MARGIN)
            center, half = interval(groups)
            text = f"{unit * center:+.{digits}f}" + (f" ± {unit * half:.{digits}f}" if isfinite(half) else "")
            said = verdict(claim, center, half, margin) if isfinite(half) else "one seed"
            pair = f"{title(claim.method)} − {title(claim.other)}, {where}"
            found.append([claim.text, pair, text, str(sum(map(len, groups))), said])
    return found
