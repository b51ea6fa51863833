"""Methods by the name of their page in docs/methods."""

import lightning_peft as lp

METHODS = {
    "lora": lp.LoRA,
    "adalora": lp.AdaLoRA,
    "fedpara": lp.FedPara,
    "krona": lp.KronA,
    "krona_block": lp.KronABlock,
    "ia3": lp.IA3,
    "bottleneck": lp.Bottleneck,
    "parallel_adapter": lp.ParallelAdapter,
    "prefix_tuning": lp.PrefixTuning,
    "p_tuning_v2": lp.PTuningV2,
    "llama_adapter": lp.LLaMAAdapter,
    "prompt_tuning": lp.PromptTuning,
    "multitask_prompt_tuning": lp.MultitaskPromptTuning,
    "p_tuning": lp.PTuning,
    "trainable_tokens": lp.TrainableTokens,
    "bitfit": lp.BitFit,
    "output_layers": lp.OutputLayers,
    "last_layers": lp.LastLayers,
    "full_fine_tuning": lp.FullFineTuning,
}
