from __future__ import annotations

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from lightning_peft.tasks.optimization import adafactor, adamw, check_optimization, multiplier


def factors(total: int, warmup_fraction: float, schedule: str) -> list[float]:
    factor = multiplier(total, warmup_fraction, schedule)
    return [round(factor(step), 6) for step in range(total + 1)]


def test_the_schedules_have_these_values() -> None:
    assert factors(4, 0.0, "constant") == [1, 1, 1, 1, 1]
    assert factors(4, 0.0, "linear") == [1, 0.75, 0.5, 0.25, 0]
    assert factors(4, 0.0, "cosine") == [1, 0.853553, 0.5, 0.146447, 0]
    assert factors(5, 0.6, "linear") == [0.25, 0.5, 0.75, 1, 0.5, 0]
    assert factors(3, 0.4, "constant") == [0.5, 1, 1, 1]
    assert factors(1, 0.06, "linear") == [1, 0]


class Line(LightningModule):
    """Records the learning rate of each step; one of its two layers is frozen."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.layer = nn.Linear(2, 1)
        self.settings = settings
        self.rates: list[float] = []

    def training_step(self, batch: Tensor, batch_index: int) -> Tensor:
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return self.layer(self.frozen(batch)).mean()

    def configure_optimizers(self) -> object:
        return adamw(self, learning_rate=0.1, weight_decay=0.02, **self.settings)


def fit(module: Line, **settings: object) -> Trainer:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(8, 2), batch_size=2))
    return trainer


def test_the_rate_changes_at_every_optimizer_step_and_frozen_parameters_stay_out() -> None:
    module = Line(warmup_fraction=0.0, schedule="linear")
    optimizer = fit(module, max_epochs=1).optimizers[0]
    assert module.rates == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert optimizer.param_groups[0]["params"] == [*module.layer.parameters()]
    assert optimizer.param_groups[0]["weight_decay"] == 0.02
    module = Line(warmup_fraction=0.0, schedule="linear")
    fit(module, max_epochs=1, accumulate_grad_batches=2)
    assert module.rates == pytest.approx([0.1, 0.1, 0.05, 0.05])


def test_training_without_an_end_needs_a_constant_rate() -> None:
    with pytest.raises(ValueError, match="needs a last step.*Set max_epochs or max_steps"):
        fit(Line(warmup_fraction=0.0, schedule="cosine"), max_epochs=-1)
    module = Line(warmup_fraction=0.0, schedule="constant")
    fit(module, max_epochs=-1, max_time={"seconds": 0})
    assert set(module.rates) <= {0.1}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, 0.0, 0.0), "learning_rate=0.0, expected a number above 0"),
        ((float("nan"), 0.0, 0.0), "learning_rate=nan"),
        ((1e-3, -1.0, 0.0), "weight_decay=-1.0, expected 0 or above"),
        ((1e-3, 0.0, 1.0), "warmup_fraction=1.0, expected a share"),
    ],
)
def test_values_that_cannot_train_are_refused(values: tuple[float, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_optimization(*values)


@pytest.mark.parametrize("shape", [(6,), (4, 5)])
def test_adafactor_steps_as_t_fews(shape: tuple[int, ...]) -> None:
    """Beside transformers', which the authors took: some gradients are zero, sizes reach over ten orders."""
    theirs = pytest.importorskip("transformers.optimization")
    torch.manual_seed(0)
    module = nn.Module()
    module.a = nn.Parameter(torch.ones(shape))
    module.trainer = type("Run", (), {"estimated_stepping_batches": 100})  # type: ignore[assignment]
    other = nn.Parameter(torch.ones(shape))
    configured = adafactor(module, learning_rate=3e-3, warmup_fraction=0.06, schedule="linear")  # type: ignore[arg-type]
    reference = theirs.Adafactor([other], lr=3e-3, scale_parameter=True, relative_step=False, warmup_init=False)
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    factor = multiplier(100, 0.06, "linear")
    for step in range(100):
        gradient = torch.randn(shape) * 10.0 ** float(torch.randint(-8, 3, ()))
        gradient[0] = 0
        module.a.grad, other.grad = gradient.clone(), gradient.clone()
        reference.param_groups[0]["lr"] = 3e-3 * factor(step)
        optimizer.step()
        reference.step()
        schedule.step()
        assert torch.allclose(module.a, other, atol=1e-6)
    assert (other[0] == 1).all()
    assert (other - 1).abs().max() > 1e-3
