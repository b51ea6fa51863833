"""python examples/fsdp2.py: two processes share a frozen base by FSDP2; the module has no line for it.

On CPUs over gloo, so that it runs anywhere. On GPUs the Trainer gets `accelerator="gpu"` and nothing else changes.
"""

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft as lp


class Decoder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)  # stands for pretrained weights
        self.network = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128,
                                                    num_hidden_layers=2, num_attention_heads=4,
                                                    initializer_range=0.1))  # fmt: skip

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.network(batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    @torch.no_grad()
    def loss(self, texts: Tensor) -> float:
        return self.eval().network(texts, labels=texts).loss.item()


if __name__ == "__main__":
    steps = torch.randint(1, 6, (128, 1), generator=torch.Generator().manual_seed(1))
    texts = torch.arange(24) * steps % 64  # counting by ones, twos, threes, ...
    module = Decoder()
    before = module.loss(texts)

    strategy = lp.PEFTStrategy(lp.LoRA(rank=8, targets=["all-linear"]))
    trainer = L.Trainer(max_epochs=4, accelerator="cpu", devices=2, strategy=lp.FSDP2Strategy(), callbacks=[strategy],
                        default_root_dir="runs/fsdp2", logger=False, enable_progress_bar=False,
                        enable_model_summary=False)  # fmt: skip
    trainer.fit(module, DataLoader(texts, 16, shuffle=True))  # each process sees half of the rows

    base = {name: p for name, p in module.network.named_parameters() if not p.requires_grad}
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in base.values())
    share = held / sum(p.numel() for p in base.values())
    adapter = lp.save_adapter(module, "runs/fsdp2/adapter")  # all processes call it, the first one writes
    if trainer.is_global_zero:  # from here on one process, without any sharding
        alone = lp.load_adapter(Decoder(), adapter)
        after = alone.loss(texts)
        resumed = lp.load_from_checkpoint(Decoder, trainer.checkpoint_callback.best_model_path)
        print(f"of the frozen base, the first of {trainer.world_size} processes holds {share:.0%}")
        print(f"loss {before:.2f} -> {after:.2f}, computed by one process with the adapter that two have trained")
        print(f"the checkpoint gives the same: {resumed.loss(texts) == after}")
