"""The hollow twin of a model does not depend on what the model was used for before."""

import torch
import transformers as t

from lightning_peft.structure.tracing.example_inputs import example_inputs
from lightning_peft.structure.tracing.hollow_twin import hollow_twin

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 32, "patch_size": 8}  # fmt: skip


def test_a_twin_records_hidden_states_after_calls_of_the_model():
    """LLaVA reads those of its tower, which transformers records by hooks that a first call installs."""
    config = t.LlavaConfig(text_config=t.LlamaConfig(**TEXT), vision_config=t.CLIPVisionConfig(**IMAGES),
                           image_token_index=60, image_token_id=60, vision_feature_layer=-1)  # fmt: skip
    model = t.LlavaForConditionalGeneration(config).eval()
    expected = example_inputs(hollow_twin(model))[1]
    assert expected["pixel_values"].shape == (1, 3, 32, 32)
    with torch.no_grad():
        model(**expected)
    found = example_inputs(hollow_twin(model))[1]
    assert found.keys() == expected.keys()
    assert found["input_ids"].shape == expected["input_ids"].shape == (1, 8 + 16)
