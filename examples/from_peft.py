"""python examples/from_peft.py: an adapter of HF peft comes in, trains on under Lightning, and goes back.

Needs `pip install peft`. Outputs are the same on both sides, before and after.
"""

import lightning as L
import peft
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lightning_peft as lp

TEXTS = torch.arange(24).repeat(64, 1) * torch.randint(1, 6, (64, 1)) % 64  # counting by ones, twos, threes, ...


def base() -> LlamaForCausalLM:
    """The base model that both sides know; `from_pretrained` in real life."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2,
                                        initializer_range=0.1))  # fmt: skip


def made_by_peft(folder: str) -> Tensor:
    """Save an adapter as peft does, and return the outputs of its model."""
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(base(), config).eval()
    model.save_pretrained(folder)
    return model(TEXTS).logits.detach()


def read_by_peft(folder: str) -> Tensor:
    """Return the outputs of peft's model with the adapter in a folder."""
    return peft.PeftModel.from_pretrained(base(), folder).eval()(TEXTS).logits.detach()


class Decoder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = base()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.network(batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    @torch.no_grad()
    def outputs(self) -> Tensor:
        return self.eval().network(TEXTS).logits

    @torch.no_grad()
    def loss(self) -> float:
        return self.eval().network(TEXTS, labels=TEXTS).loss.item()


if __name__ == "__main__":
    theirs = made_by_peft("runs/from_peft/theirs")

    module = Decoder()
    lp.import_peft(module, "runs/from_peft/theirs")  # finds the network inside of the module
    imported = (module.outputs() - theirs).abs().max().item()
    before = module.loss()

    trainer = L.Trainer(max_epochs=10, accelerator="cpu", callbacks=[lp.PEFTStrategy()], logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(module, DataLoader(TEXTS, 16, shuffle=True))  # PEFTStrategy() trains what is there
    after = module.loss()

    lp.export_peft(module, "runs/from_peft/ours", metrics={"loss": after})  # with a model card
    exported = (read_by_peft("runs/from_peft/ours") - module.outputs()).abs().max().item()

    print(f"imported: largest difference of logits {imported:.0e}")
    print(f"trained on: loss {before:.2f} -> {after:.2f}")
    print(f"exported: largest difference of logits {exported:.0e}")
