from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, Trainer, seed_everything
from torch.nn.functional import cross_entropy

import lightning_peft as lp
from lightning_peft.tasks import CausalLM, InstructionDataModule
from lightning_peft.tasks.module import mean_loss

Write = Callable[..., str]
STORIES = Path(__file__).parents[2].parent / "shared" / "models" / "stories260K"


def trainer(folder: Path, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(accelerator="cpu", default_root_dir=folder, enable_checkpointing=False, **quiet, **settings)


@pytest.fixture
def facts(decoder_tokenizer: str, write: Write) -> LightningDataModule:
    """Two facts to learn by heart, and their questions."""
    pairs = [("name one", "red film good"), ("name two", "blue"), ("name a", "bad plot")]
    path = write("t.jsonl", [{"instruction": question, "output": answer} for question, answer in pairs])
    files = {"train": path, "validation": path, "test": path, "predict": path}
    settings = {"input": None, "prompt_style": "plain", "batch_size": 2, "max_length": 99}
    return InstructionDataModule(**files, tokenizer=decoder_tokenizer, **settings)


def test_facts_are_learned_by_heart_and_generated(
    tmp_path: Path, llama: dict[str, Any], facts: LightningDataModule
) -> None:
    seed_everything(1, verbose=False)
    module = CausalLM(config=llama, learning_rate=1e-2, max_new_tokens=6)
    training = trainer(tmp_path, max_epochs=40, check_val_every_n_epoch=40)
    training.fit(module, facts)
    logged = {"tokens_per_second", "train_loss", "train_padding", "val_loss", "val_perplexity"}
    assert set(training.callback_metrics) == logged
    assert training.callback_metrics["val_loss"] < 0.05
    predictions = trainer(tmp_path).predict(module, facts)
    assert predictions == [["red film good", "blue"], ["bad plot"]]
    assert module.generate("name two") == ["blue"]
    assert module.generate(["name two", "name one"], max_new_tokens=1) == ["blue", "red"]


def test_gradient_checkpointing_saves_less_and_gives_the_same_gradients(llama: dict[str, Any]) -> None:
    saved, gradients = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        module = CausalLM(config=llama, gradient_checkpointing=checkpointing)
        lp.inject(module, lp.LoRA(rank=2))
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, n=sizes: n.append(x.numel()) or x, lambda x: x):
            loss = lp.losses.next_token(module.network, module.sample_batch(2, 16))
        loss.backward()
        saved.append(sum(sizes))
        gradients.append([p.grad for p in module.parameters() if p.requires_grad])
    assert saved[1] < saved[0] / 2
    assert len(gradients[0]) == 2 * 2 * llama["num_hidden_layers"]
    torch.testing.assert_close(gradients[1], gradients[0])


def test_the_share_of_padding_is_logged_and_no_device_waits_for_it(
    tmp_path: Path, llama: dict[str, Any], facts: LightningDataModule
) -> None:
    module, facts.batch_size = CausalLM(config=llama), 3
    training = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    training.fit(module, facts)
    (mask,) = [batch["attention_mask"] for batch in facts.train_dataloader()]
    assert float(training.callback_metrics["train_padding"]) == pytest.approx(1 - float(mask.sum()) / mask.numel())
    assert 0.1 < training.callback_metrics["train_padding"] < 0.9
    logged: dict[str, torch.Tensor] = {}
    module.log = logged.__setitem__  # type: ignore[method-assign, assignment]
    module.on_train_batch_start({"attention_mask": torch.ones(2, 3, device="meta")}, 0)
    assert logged["train_padding"].is_meta
    module.on_train_batch_start({"pixel_values": torch.ones(2, 3)}, 0)
    assert list(logged) == ["train_padding"]


def test_losses_are_means_over_tokens_whatever_the_batches(
    tmp_path: Path, llama: dict[str, Any], facts: LightningDataModule
) -> None:
    module = CausalLM(config=llama)
    (results,) = trainer(tmp_path).test(module, facts, verbose=False)
    losses = []
    for row in facts.examples("test"):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = module.eval().network(input_ids=ids).logits[0]
        losses += cross_entropy(logits[:-1], labels[1:], reduction="none", ignore_index=-100)[
            labels[1:] != -100
        ].tolist()
    assert len(losses) == 4 + 2 + 3  # each answer and its end token
    assert results["test_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert results["test_perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_two_steps_train_every_parameter(tmp_path: Path, llama: dict[str, Any], facts: LightningDataModule) -> None:
    module = CausalLM(config=llama)
    before = {name: value.clone() for name, value in module.network.named_parameters()}
    trainer(tmp_path, max_steps=2).fit(module, facts)
    assert not [name for name, value in module.network.named_parameters() if torch.equal(value, before[name])]


def test_a_batch_without_labelled_tokens_has_loss_zero(llama: dict[str, Any]) -> None:
    ids = torch.tensor([[1, 5, 6]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
    module = quiet(llama)
    assert mean_loss(*module.labelled(batch)) == 0
    loss = module.training_step(batch, 0)
    assert loss == 0
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.network.parameters())


def quiet(config: dict[str, Any]) -> CausalLM:
    seed_everything(0, verbose=False)
    module = CausalLM(config=config)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    return module


def test_the_loss_of_a_step_is_that_of_transformers_and_its_output_layer_sees_labelled_places(
    llama: dict[str, Any],
) -> None:
    module, shapes = quiet(llama), list[Any]()
    ids = torch.randint(3, 12, (2, 7))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), "other": ids}
    batch["labels"][:, :4] = -100
    wanted = module.network(input_ids=ids, labels=batch["labels"]).loss
    module.network.lm_head.register_forward_hook(lambda *args: shapes.append(tuple(args[2].shape)))
    loss = module.training_step(batch, 0)
    logits, labels = module.labelled(batch)
    assert shapes == [(1, 6, module.network.config.vocab_size)] * 2
    assert labels.tolist() == ids[:, 4:].flatten().tolist()
    parameters = list(module.network.parameters())
    expected = torch.autograd.grad(wanted, parameters)
    for found in (loss, mean_loss(logits, labels)):
        assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
        for a, b in zip(torch.autograd.grad(found, parameters), expected, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_rows_of_several_tasks_have_the_losses_of_their_prompts(llama: dict[str, Any]) -> None:
    module = quiet(llama).eval()
    lp.inject(module, lp.PromptTuning(length=2, tasks=2))
    ids = torch.randint(3, 12, (2, 5))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    together = module.training_step({**batch, "task_ids": torch.tensor([1, 0])}, 0)
    alone = []
    for row, task in enumerate((1, 0)):
        with lp.row_tasks(module, task):
            alone.append(module.network(input_ids=ids[row : row + 1], labels=ids[row : row + 1]).loss.item())
    assert abs(alone[0] - alone[1]) > 1e-4
    assert together.item() == pytest.approx(sum(alone) / 2, rel=1e-5)


def test_generation_does_not_depend_on_the_side_of_padding_and_restores_modes(
    llama: dict[str, Any], decoder_tokenizer: str
) -> None:
    seed_everything(5, verbose=False)
    module = CausalLM(config=llama, tokenizer=decoder_tokenizer, max_new_tokens=5)
    module.network.model.norm.eval()
    right = {"input_ids": torch.tensor([[1, 7, 2, 2], [1, 7, 8, 9]])}
    right["attention_mask"] = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    left = {"input_ids": torch.tensor([[2, 2, 1, 7], [1, 7, 8, 9]])}
    left["attention_mask"] = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    alone = {name: value[:1, :2] for name, value in right.items()}
    texts = module.generate(right)
    assert texts == module.generate(left)
    assert texts[:1] == module.generate(alone) == module.generate("film")
    assert [name for name, part in module.network.named_modules() if not part.training] == ["model.norm"]


def test_text_needs_a_tokenizer(llama: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="neither model nor tokenizer, so text cannot be read. Give CausalLM"):
        CausalLM(config=llama).generate("name")
    with pytest.raises(ValueError, match="expected exactly one of the two"):
        CausalLM()


@pytest.mark.skipif(not STORIES.is_dir(), reason="the shared models are not here")
def test_a_real_model_tells_a_story() -> None:
    (story,) = CausalLM(str(STORIES)).generate("Once upon a time", max_new_tokens=12)
    assert "there was a" in story
