"""python benchmarks/town_hall.py [names]: methods on the town-hall messages, once; writes results/town_hall.{json,svg}.

Without names, all of them run; with names, their numbers replace the old ones. Each run is the command that stands in
its configuration's first line. The table and the picture in README.md are these.
"""

import json
import math
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
METHODS = [
    *["output_layers", "ia3", "bottleneck", "parallel_adapter", "prefix_tuning", "mam", "p_tuning_v2", "prompt_tuning"],
    *["multitask_prompt_tuning", "p_tuning", "bitfit", "krona", "krona_block", "lora", "dora", "fedpara", "adalora"],
    *["qlora", "last_layers", "full_fine_tuning"],
]


def run(name: str) -> dict[str, object]:
    command = [sys.executable, "-m", "lightning_peft", "fit", "--config", f"configs/{name}.yaml"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    folder = ROOT / "runs" / "benchmark" / name
    start = time.perf_counter()
    place = ["--trainer.logger.init_args.save_dir", str(folder), "--trainer.logger.init_args.name", "run"]
    subprocess.run([*command, *quiet, *place], cwd=ROOT, check=True)
    report = json.loads(max(folder.rglob("report.json"), key=lambda path: path.stat().st_mtime).read_text())
    report.setdefault("test_accuracy", report.get("test_p_at_1"))  # of the department's word, among eight
    kept = ("test_accuracy", "test_macro_f1", "trainable_parameters", "total_parameters", "checkpoint_bytes")
    return {key: report[key] for key in kept if key in report} | {"seconds": round(time.perf_counter() - start, 1)}


def picture(results: dict[str, dict[str, float]]) -> str:
    """An SVG: test accuracy over trained parameters."""
    total = max(370, 65 + 20 * len(results))
    left, bottom, width, height = 70, total - 70, 560, total - 120
    counts = [row["trainable_parameters"] for row in results.values()]
    low, high = math.floor(math.log10(min(counts))), math.ceil(math.log10(max(counts)))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {total}" font-family="sans-serif" font-size="13">',
        f'<rect width="860" height="{total}" fill="white"/>',
    ]
    for power in range(low, high + 1):
        x = left + width * (power - low) / (high - low)
        parts.append(f'<line x1="{x}" y1="50" x2="{x}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x}" y="{bottom + 20}" text-anchor="middle">{10**power:,}</text>')
    for percent in range(60, 75, 5):
        y = bottom - height * (percent - 60) / 15
        parts.append(f'<line x1="{left}" y1="{y}" x2="{left + width}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{percent} %</text>')
    ordered = sorted(results.items(), key=lambda item: item[1]["trainable_parameters"])
    for number, (name, row) in enumerate(ordered, 1):
        x = left + width * (math.log10(row["trainable_parameters"]) - low) / (high - low)
        y = bottom - height * (100 * row["test_accuracy"] - 60) / 15
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="#6a3fb5" fill-opacity="0.8"/>')
        style = 'text-anchor="middle" font-size="11" fill="white"'
        parts.append(f'<text x="{x:.1f}" y="{y + 4:.1f}" {style}>{number}</text>')
        parts.append(f'<text x="685" y="{45 + 20 * number}">{number}  {name.replace("_", " ")}</text>')
    parts.append(f'<text x="{left + width / 2}" y="{bottom + 45}" text-anchor="middle">trained parameters</text>')
    parts.append(f'<text x="{left}" y="30">test accuracy on the town-hall messages</text></svg>')
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    target = ROOT / "benchmarks" / "results"
    old = json.loads((target / "town_hall.json").read_text())["results"] if sys.argv[1:] else {}
    new = {name: run(name) for name in sys.argv[1:] or METHODS}
    results = {name: (old | new)[name] for name in METHODS if name in old | new}
    versions = {name: version(name) for name in ("torch", "lightning", "transformers", "lightning-peft")}
    where = {"machine": f"{platform.machine()}, CPU", "python": platform.python_version(), **versions}
    (target / "town_hall.json").write_text(json.dumps({"where": where, "results": results}, indent=2) + "\n")
    (target / "town_hall.svg").write_text(picture(results))
    for name, row in results.items():
        print(
            f"| {name} | {row['trainable_parameters']:,} | {row['checkpoint_bytes']:,} | {row['test_accuracy']:.3f} |"
        )
