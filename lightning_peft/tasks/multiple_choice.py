"""``Choices``: a LightningModule that picks one of several answers, trained as T-Few (arXiv:2205.05638)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from lightning_peft.losses import PADDING, Likelihoods
from lightning_peft.losses.answer_tokens import answer_likelihoods
from lightning_peft.losses.places import Places
from lightning_peft.tasks.choice_inputs import continued, padded_at_the_end
from lightning_peft.tasks.data.listed_choices import TEXTS
from lightning_peft.tasks.data.mixed_loader import TASK_IDS
from lightning_peft.tasks.module import TaskModule
from lightning_peft.tasks.optimization import adafactor, check_optimization
from lightning_peft.tasks.pretrained import build_model, has_encoder, transformers


class Choices(TaskModule):
    """Picks the most likely answer to each prompt, by the mean log-probability of its tokens; logs ``val_accuracy``.

    Trains by a weighted sum of three losses of `lightning_peft.losses`: L_LM makes the right answer likely, L_UL the
    tokens of wrong ones unlikely, L_LN the right one the likeliest. Adafactor optimizes, with a scale for each
    parameter's size. The model has an encoder (T5, T0, BART), which reads each prompt once, or is a decoder alone. Give
    exactly one of ``model`` and ``config``; the network is built in train mode.

    Args:
        model: Pretrained model: a folder, package:name/folder in an installed Python package, or a hub name.
        config: Settings of a model with random weights, with its model_type; or a config.json, or its folder.
        lm_weight: Weight of L_LM; 0 switches a loss off.
        unlikelihood_weight: Weight of L_UL.
        length_normalized_weight: Weight of L_LN.
        epsilon: Added inside the logarithm of L_UL: 0 in the paper, 0.01 in the authors' code.
        learning_rate: Highest learning rate.
        warmup_fraction: Share of all steps in which the learning rate grows.
        schedule: What the learning rate does after the warm-up.
        dtype: Data type of the weights; auto keeps that of the pretrained file. Adapters are in float32 in any case.

    Examples:
        >>> from lightning_peft.tasks import Choices
        >>> sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
        >>> module = Choices(config={"model_type": "t5", "vocab_size": 32, **sizes})
        >>> module(**module.sample_batch(2, 16)).shape  # 2 rows of 2 choices of 2 tokens
        torch.Size([4, 2, 32])
    """

    accuracy = "accuracy"

    def __init__(
        self,
        model: str | None = None,
        config: dict[str, Any] | str | None = None,
        lm_weight: float = 1.0,
        unlikelihood_weight: float = 1.0,
        length_normalized_weight: float = 1.0,
        epsilon: float = 0.0,
        learning_rate: float = 3e-3,
        warmup_fraction: float = 0.06,
        schedule: Literal["linear", "cosine", "constant"] = "linear",
        dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
    ) -> None:
        super().__init__(MetricCollection({"accuracy": MeanMetric()}))
        check_optimization(learning_rate, 0.0, warmup_fraction)
        self.weights = (lm_weight, unlikelihood_weight, length_normalized_weight)
        if not (all(weight >= 0 for weight in self.weights) and any(self.weights)):
            raise ValueError(
                f"Got lm_weight={lm_weight}, unlikelihood_weight={unlikelihood_weight} and length_normalized_weight="
                f"{length_normalized_weight}, expected weights from 0 on, at least one of them above 0."
            )
        if not epsilon >= 0:
            raise ValueError(f"Got epsilon={epsilon}, expected 0 (as in the paper) or above, such as 0.01.")
        self.save_hyperparameters()
        self.has_encoder = has_encoder(model, config)
        kind = "AutoModelForSeq2SeqLM" if self.has_encoder else "AutoModelForCausalLM"
        self.network = build_model(kind, model, config, dtype)
        self.names: list[list[str] | None] = []  # of each task's choices

    @property
    def class_names(self) -> list[str] | None:
        """The names of the choices, where there is one task: predictions have their probabilities by these."""
        return self.names[0] if len(self.names) == 1 else None

    def setup(self, stage: str) -> None:
        """Take the names of the choices, and check that the data fits the model."""
        data = self.data_of_tasks()
        self.names = [getattr(task, "labels", None) for task in data]
        for task in data:
            if getattr(task, "decoder_only", not self.has_encoder) == self.has_encoder:
                raise ValueError(
                    f"The data has decoder_only={task.decoder_only}, but {type(self.network).__name__} has "
                    f"{'an' if self.has_encoder else 'no'} encoder. Set decoder_only={not self.has_encoder} there."
                )

    def forward(self, **batch: Tensor) -> Tensor:
        """Logits of the tokens of each choice, absent choices left out, as `lightning_peft.losses` takes them.

        Args:
            batch: ``input_ids``, ``attention_mask``, ``choices`` (batch, choices, tokens) with -100 after the end of
                each, and ``task_ids`` where adapters hold several tasks; anything else is ignored.

        Shape:
            (present choices, tokens, vocabulary)
        """
        inputs, tasks, positions, _ = self._asked(batch)
        with self.own_tasks(tasks):
            logits: Tensor = self.network(**inputs, use_cache=False).logits
        return logits[torch.arange(len(logits), device=logits.device)[:, None], positions]

    def _asked(self, batch: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor], Tensor, Tensor]:
        """Return the arguments of the call for all choices, their tasks, the positions that predict them, and they."""
        batch = {**batch, **padded_at_the_end(batch["input_ids"], batch["attention_mask"])}
        present, mask = Places.of((batch["choices"] != PADDING).any(-1)), batch["attention_mask"]
        rows, answers = present.numbers // present.shape[1], present.take(batch["choices"])
        tasks = {TASK_IDS: batch[TASK_IDS][rows]} if TASK_IDS in batch else {}
        positions = torch.arange(answers.shape[1], device=rows.device).expand_as(answers)
        if not self.has_encoder:
            first = mask[rows].sum(1) - 1  # the prompt's last token predicts the answer's first
            return continued(batch["input_ids"][rows], mask[rows], answers), tasks, first[:, None] + positions, answers
        with self.own_tasks(batch):
            hidden = self.network.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        outputs = transformers().modeling_outputs.BaseModelOutput(last_hidden_state=hidden.index_select(0, rows))
        start = torch.full_like(answers[:, :1], self._start())
        before = torch.cat([start, answers[:, :-1].clamp(min=0)], 1)  # what stands at padding is not looked at
        inputs = {"encoder_outputs": outputs, "attention_mask": mask[rows], "decoder_input_ids": before}
        return inputs, tasks, positions, answers

    def _start(self) -> int:
        """Return the token that stands before every answer; T5's padding token where the config names none."""
        config = self.network.config
        tokens = [getattr(config, name, None) for name in ("decoder_start_token_id", "pad_token_id")]
        return int(next(token for token in tokens if token is not None))

    def sample_batch(self, rows: int, tokens: int) -> dict[str, Tensor]:
        """A batch of this shape, two choices of an eighth as many tokens with it, or within it for a decoder."""
        answer = max(1, tokens // 8)
        batch = super().sample_batch(rows, tokens if self.has_encoder else max(1, tokens - answer))
        return {**batch, "choices": torch.ones(rows, 2, answer, dtype=torch.long)}

    def labelled(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The choices' scores, whose cross entropy is L_LN, and the right choices."""
        return self._likelihoods(batch).scores, batch["labels"]

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        """The weighted sum of the losses, each of which is logged."""
        if not any(self.weights[1:]):  # wrong choices do not matter
            gold = batch["labels"]
            right = batch["choices"][torch.arange(len(gold), device=gold.device), gold]
            batch = {**batch, "choices": right[:, None], "labels": torch.zeros_like(gold)}
        return self._loss("train", batch, self._likelihoods(batch))

    def predict_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Any]:
        """The label of each answer, or its text if rows list choices; a softmax over scores: 0 where one is absent."""
        scores = self._likelihoods(batch).scores
        tasks = batch[TASK_IDS].tolist() if TASK_IDS in batch else [0] * len(scores)
        best = scores.argmax(1).tolist()
        names = batch.get(TEXTS) or [self.names[task] if task < len(self.names) else None for task in tasks]
        labels = [number if choices is None else choices[number] for choices, number in zip(names, best, strict=True)]
        return {"labels": labels, "probabilities": scores.softmax(1)}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adafactor over what requires a gradient, with the schedule."""
        return adafactor(self, **{n: self.hparams[n] for n in ("learning_rate", "warmup_fraction", "schedule")})

    def _likelihoods(self, batch: dict[str, Tensor]) -> Likelihoods:
        """Return the likelihoods of the choices' tokens: logits exist at these alone, a chunk of them at a time."""
        inputs, tasks, positions, answers = self._asked(batch)
        known = answers != PADDING
        read = inputs["input_ids" if "input_ids" in inputs else "decoder_input_ids"]
        places = Places.of(torch.zeros_like(read, dtype=torch.bool).scatter(1, positions, known))
        here = places.take(torch.zeros_like(read).scatter(1, positions, answers))
        needs_rest = self.weights[1] > 0 and self.hparams["epsilon"] == 0
        with self.own_tasks(tasks):
            tokens = answer_likelihoods(self.network, inputs, places, here, needs_rest)
        return Likelihoods(None, batch["choices"], batch.get("labels"), tokens)

    def _evaluate(self, split: str, batch: dict[str, Tensor]) -> None:
        likelihoods = self._likelihoods(batch)
        self._loss(split, batch, likelihoods)
        self.measure(split, batch, (likelihoods.scores.argmax(1) == batch["labels"]).float())

    def _loss(self, split: str, batch: dict[str, Tensor], likelihoods: Likelihoods) -> Tensor:
        """Return the weighted sum, and log it and its terms; terms without weight are not computed."""
        functions = {
            "lm": likelihoods.language_modeling,
            "unlikelihood": lambda: likelihoods.unlikelihood(self.hparams["epsilon"]),
            "length_normalized": likelihoods.length_normalized,
        }
        weighted = {name: (w, functions[name]()) for name, w in zip(functions, self.weights, strict=True) if w > 0}
        losses = {f"{split}_{name}_loss": loss.detach() for name, (_, loss) in weighted.items()}
        total = torch.stack([weight * loss for weight, loss in weighted.values()]).sum()
        shared: dict[str, Any] = {"batch_size": len(batch["labels"]), "sync_dist": split != "train"}
        self.log_dict(losses, **shared)
        self.log(f"{split}_loss", total, prog_bar=True, **shared)
        return total
