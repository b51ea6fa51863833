"""python docs/draw_methods.py: draws docs/methods/pictures/*.svg, a small picture of what each method trains."""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script, it finds its own package

from docs.drawing import blocks, prompts, weights  # noqa: E402
from docs.drawing.picture import Picture  # noqa: E402

FOLDER = Path(__file__).with_name("methods") / "pictures"
SCENES: dict[str, Callable[[], Picture]] = {
    scene.__name__: scene
    for scene in (
        *(weights.lora, weights.dora, weights.adalora, weights.qlora, weights.fedpara, weights.krona, weights.ia3),
        *(weights.t_few, weights.bitfit, blocks.krona_block, blocks.bottleneck, blocks.parallel_adapter, blocks.mam),
        *(blocks.output_layers, blocks.last_layers, blocks.full_fine_tuning, blocks.feature_based),
        *(prompts.prefix_tuning, prompts.p_tuning_v2, prompts.llama_adapter, prompts.prompt_tuning),
        *(prompts.multitask_prompt_tuning, prompts.p_tuning, prompts.trainable_tokens),
    )
}


def draw() -> dict[str, str]:
    """Return each picture by the stem of its file, which is that of the method's page."""
    return {name: scene().svg() for name, scene in SCENES.items()}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, svg in draw().items():
        (FOLDER / f"{name}.svg").write_text(svg, encoding="utf-8")
    print(f"wrote {len(SCENES)} pictures to {FOLDER}")
