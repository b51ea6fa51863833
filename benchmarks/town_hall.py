"""python benchmarks/town_hall.py [names]: methods on the town-hall messages, once; writes results/town_hall.{json,png}.

Without names, all of them run; with names, their numbers replace the old ones. Each run is the command that stands in
its configuration's first line. The table and the picture in README.md are these.
"""

import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from lightning_peft import plots

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
METHODS = [
    *["output_layers", "ia3", "bottleneck", "parallel_adapter", "prefix_tuning", "mam", "p_tuning_v2", "prompt_tuning"],
    *["multitask_prompt_tuning", "p_tuning", "bitfit", "krona", "krona_block", "lora", "dora", "fedpara", "adalora"],
    *["qlora", "trainable_tokens", "last_layers", "full_fine_tuning"],
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


def draw(results: dict[str, dict[str, float]]) -> None:
    points = {name: (row["trainable_parameters"], row["test_accuracy"]) for name, row in results.items()}
    figure = plots.accuracy_over_parameters(points, "test accuracy on the town-hall messages")
    plots.save(figure, RESULTS / "town_hall.png")


if __name__ == "__main__":
    old = json.loads((RESULTS / "town_hall.json").read_text())["results"] if sys.argv[1:] else {}
    new = {name: run(name) for name in sys.argv[1:] or METHODS}
    results = {name: (old | new)[name] for name in METHODS if name in old | new}
    versions = {name: version(name) for name in ("torch", "lightning", "transformers", "lightning-peft")}
    where = {"machine": f"{platform.machine()}, CPU", "python": platform.python_version(), **versions}
    (RESULTS / "town_hall.json").write_text(json.dumps({"where": where, "results": results}, indent=2) + "\n")
    draw(results)
    for name, row in results.items():
        print(
            f"| {name} | {row['trainable_parameters']:,} | {row['checkpoint_bytes']:,} | {row['test_accuracy']:.3f} |"
        )
