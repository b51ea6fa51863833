"""A small Llama with many adapters, of which one is active or each row of a batch has its own: ours and HF peft."""

from collections.abc import Callable, Sequence

import peft
from llama_sides import CASES
from torch import Tensor, nn

import lightning_peft as lp

BY_ROW = ("lora", "lora_linears", "ia3", "bottleneck")  # what differs by row in one call; peft does so with LoRA
ALONE = ("adalora",)  # of peft, which trains one at most
ROWS = 64


def many_adapters(name: str, count: int, build: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    """Return the model of each side with as many adapters of a method, of which a0 is active."""
    case, ours = CASES[name], build()
    for number in range(count):
        lp.add_adapter(ours, case.ours(ours.config), f"a{number}")
    sides = {"ours": lp.activate(ours, "a0")}
    if case.peer is not None:
        sides["peft"] = peft.get_peft_model(build(), case.peer(ours.config), adapter_name="a0")
        for number in range(1, count):
            sides["peft"].add_adapter(f"a{number}", case.peer(ours.config))
        sides["peft"].set_adapter("a0")
    return {who: stirred(side) for who, side in sides.items()}


def stirred(model: nn.Module) -> nn.Module:
    """Fill what starts at zero, in inactive adapters as well."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


class ByRow(nn.Module):
    """Calls a model with an adapter named for each row; a context that opens anew in each call, or peft's argument."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, input_ids: Tensor) -> object:
        if isinstance(self.model, peft.PeftModel):
            return self.model(input_ids=input_ids, adapter_names=self.names)
        with lp.row_adapters(self.model, self.names):
            return self.model(input_ids=input_ids)
