from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sampling import diagonal

import lightning_peft as lp
from lightning_peft.losses import Likelihoods, chunks, head_inputs
from lightning_peft.tasks import Choices, ChoicesDataModule, MixedDataModule

Write = Callable[..., str]
TEMPLATES = {"asked": "{text} was the film", "named": "the ending {text}"}
ANSWERS = {"neg": "bad film", "pos": "good"}


@pytest.fixture(params=["t5", "llama", "bart"])
def kind(request: pytest.FixtureRequest, t5: dict[str, Any], llama: dict[str, Any]) -> dict[str, Any]:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 32, "pad_token_id": 0}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    bart = {"model_type": "bart", "max_position_embeddings": 64, **sizes, **heads}
    return {"t5": t5, "llama": llama, "bart": bart}[request.param]


def batch(absent: bool = True) -> dict[str, torch.Tensor]:
    """Two prompts, one padded on the left as some tokenizers do; the first has two choices, the second three."""
    prompts = torch.tensor([[2, 5, 6, 7, 3], [0, 0, 2, 9, 3]])
    choices = torch.tensor([[[4, 3, -100], [8, 9, 3], [-100] * 3], [[5, 3, -100], [6, 7, 3], [8, 3, -100]]])
    if not absent:
        choices[0, 2] = torch.tensor([4, 4, 3])
    return {"input_ids": prompts, "attention_mask": (prompts != 0).long(), "choices": choices}


def naive(module: Choices, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean log-probability of each choice, by one call for each prompt and choice, without padding."""
    betas = torch.full(given["choices"].shape[:2], -torch.inf)
    for row, number in (given["choices"] != -100).any(-1).nonzero().tolist():
        prompt = given["input_ids"][row][given["attention_mask"][row] == 1]
        answer = given["choices"][row, number]
        answer = answer[answer != -100]
        if module.has_encoder:
            start = getattr(module.network.config, "decoder_start_token_id", None) or 0
            before = torch.cat([torch.tensor([start]), answer[:-1]])
            logits = module.network(input_ids=prompt[None], decoder_input_ids=before[None]).logits[0]
        else:
            logits = module.network(torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
        betas[row, number] = logits.log_softmax(-1).gather(1, answer[:, None]).mean()
    return betas


def test_scores_equal_one_call_for_each_choice_and_the_encoder_runs_once(kind: dict[str, Any]) -> None:
    seed_everything(0, verbose=False)
    module, given, calls = Choices(config=kind).eval().double(), batch(), []
    if module.has_encoder:
        module.network.get_encoder().register_forward_hook(lambda *args: calls.append(len(args[2][0])))
    logits = module(**given)
    assert logits.shape == (5, 3, 32)
    assert calls == ([2] if module.has_encoder else [])
    scores = Likelihoods(logits, given["choices"]).scores
    wanted = naive(module, given)
    assert torch.allclose(scores.float(), wanted, atol=1e-6)
    prediction = module.predict_step(given, 0)
    assert prediction["labels"] == wanted.argmax(1).tolist()
    assert torch.allclose(prediction["probabilities"].float(), wanted.softmax(1), atol=1e-6)
    assert prediction["probabilities"][0, 2] == 0


def test_gradients_equal_those_of_one_call_for_each_choice(kind: dict[str, Any]) -> None:
    seed_everything(0, verbose=False)
    module, given = Choices(config=kind).eval().double(), batch(absent=False)
    gold = torch.tensor([2, 0])
    found = Likelihoods(module(**given), given["choices"], gold).length_normalized()
    wanted = -naive(module, given).double().log_softmax(1)[[0, 1], gold].mean()
    parameters = dict(module.network.named_parameters())
    used = [torch.autograd.grad(loss, [*parameters.values()], allow_unused=True) for loss in (found, wanted)]
    for name, a, b in zip(parameters, *used, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or torch.allclose(a, b, atol=1e-6), name


@diagonal(("epsilon", "several"), [0.0, 0.01], [False, True])
def test_likelihoods_are_those_of_all_logits_and_the_output_layer_sees_tokens_of_choices_alone(
    kind: dict[str, Any], epsilon: float, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if several:  # chunks of two tokens
        monkeypatch.setattr(head_inputs, "_FEW", 1)
        monkeypatch.setattr(chunks, "chunk_rows", lambda _: 2)
    seed_everything(0, verbose=False)
    module, gold = Choices(config=kind, epsilon=epsilon).eval().double(), torch.tensor([1, 2])
    if "final_logits_bias" in dict(module.network.named_buffers()):
        module.network.final_logits_bias.normal_()
    given = batch() | {"labels": gold}
    wanted, places = Likelihoods(module(**given), given["choices"], gold), list[int]()
    module.network.get_output_embeddings().register_forward_hook(lambda *args: places.append(args[2][..., 0].numel()))
    found = module._likelihoods(given)
    pairs = [(x.language_modeling(), x.length_normalized(), x.unlikelihood(epsilon)) for x in (found, wanted)]
    assert places == ([1, *[2] * 6] if several else [12])
    assert found.scores.isinf().sum() == 1  # that of the absent choice
    assert torch.allclose(found.scores, wanted.scores, atol=1e-12)
    parameters = list(module.network.parameters())
    for a, b in zip(*pairs, strict=True):
        assert a.item() == pytest.approx(b.item(), abs=1e-12)
        for x, y in zip(*(torch.autograd.grad(z, parameters, retain_graph=True) for z in (a, b)), strict=True):
            assert torch.allclose(x, y, atol=1e-12)


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    settings = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), **quiet, **settings}
    return Trainer(default_root_dir=folder, accelerator="cpu", callbacks=list(callbacks), **settings)


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        ((1.0, 1.0, 1.0), {"lm", "unlikelihood", "length_normalized"}),
        ((2.0, 0.0, 0.5), {"lm", "length_normalized"}),
        ((1.0, 0.0, 0.0), {"lm"}),
        ((0.0, 1.5, 0.0), {"unlikelihood"}),
    ],
)
def test_the_loss_is_the_weighted_sum_of_those_that_are_on(
    t5: dict[str, Any], weights: tuple[float, float, float], names: set[str]
) -> None:
    seed_everything(0, verbose=False)
    lm, ul, ln = weights
    module = Choices(
        config=t5, lm_weight=lm, unlikelihood_weight=ul, length_normalized_weight=ln, epsilon=0.01
    ).eval()  # fmt: skip
    logged: dict[str, Any] = {}
    module.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[method-assign]
    module.log_dict = lambda values, **_: logged.update(values)  # type: ignore[method-assign]
    given = batch() | {"labels": torch.tensor([1, 2])}
    loss = module.training_step(given, 0)
    logits, gold = module(**given), given["labels"]
    parts = {
        "lm": lm * lp.losses.language_modeling(logits, given["choices"], gold),
        "unlikelihood": ul * lp.losses.unlikelihood(logits, given["choices"], gold, 0.01),
        "length_normalized": ln * lp.losses.length_normalized(logits, given["choices"], gold),
    }
    assert loss.item() == pytest.approx(sum(parts.values()).item(), rel=1e-5)
    assert set(logged) == {"train_loss"} | {f"train_{name}_loss" for name in names}


@pytest.fixture
def files(reviews: str, write: Write) -> dict[str, Any]:
    rows = [{"text": f"the {noun} was {word}", "label": label} for noun in ("plot", "film") for word, label in
            (("good", "pos"), ("awful", "neg"))]  # fmt: skip
    return {"train": reviews, "validation": write("v.jsonl", rows), "test": write("t.jsonl", rows), "predict": reviews}


@pytest.mark.slow
def test_few_shots_train_ia3_alone_and_rank_right(
    t5: dict[str, Any], files: dict[str, Any], encoder_tokenizer: str, tmp_path: Path
) -> None:
    seed_everything(1, verbose=False)
    data = ChoicesDataModule(TEMPLATES, ANSWERS, tokenizer=encoder_tokenizer, max_length=64, **files)
    module = Choices(config={**t5, "dropout_rate": 0.0}, learning_rate=0.1)
    strategy = lp.PEFTStrategy([lp.IA3(), lp.LoRA(rank=8, targets=["all-linear"])], show_summary=False)
    run = trainer(tmp_path, strategy, max_epochs=25, gradient_clip_val=1.0, check_val_every_n_epoch=25)
    run.fit(module, data)
    assert isinstance(run.optimizers[0], torch.optim.Adafactor)
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert trained
    assert all(".peft." in name for name in trained)
    assert run.callback_metrics["val_accuracy"] == 1
    (results,) = run.test(module, data, verbose=False)
    assert results["test_accuracy"] == 1
    assert results["test_loss"] == pytest.approx(
        sum(results[f"test_{name}_loss"] for name in ("lm", "unlikelihood", "length_normalized")), rel=1e-5
    )
    labels = [label for found in run.predict(module, data) for label in found["labels"]]
    assert labels == ["pos", "neg", "pos", "neg"] * 8


class Seen(Callback):
    """Keeps what each step trained on."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.batches.append({name: value.tolist() for name, value in batch.items()})


def data_module(files: dict[str, Any], tokenizer: str, mixed: bool) -> Any:
    settings = {"tokenizer": tokenizer, "max_length": 64, "batch_size": 16, **files}
    first = ChoicesDataModule(TEMPLATES, ANSWERS, **settings)
    if not mixed:
        return first
    second = ChoicesDataModule({"bare": "{text}", "film": "film {text}"}, {"pos": "one", "neg": "two"}, **settings)
    return MixedDataModule({"films": first, "numbers": second}, batch_size=32)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@diagonal(("mixed", "when"), [False, True], ["inside", "end"])
def test_a_resumed_run_sees_the_same_wordings_and_ends_with_the_same_weights(
    t5: dict[str, Any], files: dict[str, Any], encoder_tokenizer: str, tmp_path: Path, when: str, mixed: bool
) -> None:
    """32 rows in 2 batches (or 64 in 2), dropout and all; stopped after 3 steps, or after an epoch."""

    def run(steps: int, *callbacks: Any, path: Any = None) -> tuple[dict[str, torch.Tensor], list[Any]]:
        seed_everything(5, verbose=False)
        module, seen = Choices(config=t5, schedule="constant"), Seen()
        strategy = lp.PEFTStrategy(lp.IA3(), show_summary=False, frozen_mode="train")
        tuner = trainer(tmp_path, strategy, seen, *callbacks, max_steps=steps, num_sanity_val_steps=0)
        tuner.fit(module, data_module(files, encoder_tokenizer, mixed), ckpt_path=path)
        return module.state_dict(), seen.batches

    stop = {"inside": {"every_n_train_steps": 3}, "end": {"every_n_epochs": 1, "save_on_train_epoch_end": True}}[when]
    whole, batches = run(5)
    first = 3 if when == "inside" else 2
    run(first, ModelCheckpoint(tmp_path / "half", save_last=True, **stop))
    resumed, rest = run(5, path=tmp_path / "half" / "last.ckpt")
    assert rest == batches[first:]
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_tasks_of_a_mixture_have_own_answers_metrics_and_names(
    t5: dict[str, Any], files: dict[str, Any], encoder_tokenizer: str, tmp_path: Path
) -> None:
    seed_everything(0, verbose=False)
    settings = {"tokenizer": encoder_tokenizer, "max_length": 64, **files}
    three = {"pos": "one", "neg": "two", "other": "red blue"}
    tasks = {
        "films": ChoicesDataModule(TEMPLATES, ANSWERS, **settings),
        "numbers": ChoicesDataModule({"bare": "{text}"}, three, **settings),
    }
    data, module = MixedDataModule(tasks, batch_size=5), Choices(config=t5)
    run = trainer(tmp_path, max_steps=2)
    run.fit(module, data)
    (results,) = run.test(module, data, verbose=False)
    right: dict[str, list[bool]] = {"films": [], "numbers": []}
    module.eval()
    for number, (name, task) in enumerate(tasks.items()):
        for given in task.test_dataloader():
            with torch.no_grad():
                right[name] += (naive(module, given).argmax(1) == given["labels"]).tolist()
        assert results[f"test_accuracy/{name}"] == pytest.approx(sum(right[name]) / 4), number
    assert results["test_accuracy"] == pytest.approx(sum(sum(each) for each in right.values()) / 8)
    found = [label for each in run.predict(module, data) for label in each["labels"]]
    assert len(found) == 64
    assert set(found[:32]) <= {"neg", "pos"}
    assert set(found[32:]) <= {"pos", "neg", "other"}


def test_settings_that_cannot_train_are_refused(
    t5: dict[str, Any], bert: dict[str, Any], files: dict[str, Any], encoder_tokenizer: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="expected weights from 0 on, at least one of them above 0"):
        Choices(config=t5, lm_weight=0, unlikelihood_weight=0, length_normalized_weight=0)
    with pytest.raises(ValueError, match="unlikelihood_weight=-1"):
        Choices(config=t5, unlikelihood_weight=-1)
    with pytest.raises(ValueError, match="epsilon=nan, expected 0"):
        Choices(config=t5, epsilon=float("nan"))
    with pytest.raises(ValueError, match="exactly one of the two"):
        Choices()
    with pytest.raises(ValueError, match=r"is an encoder \(bert\), which sees all tokens .* or ask with Cloze"):
        Choices(config=bert)
    data = ChoicesDataModule(
        TEMPLATES, ANSWERS, decoder_only=True, tokenizer=encoder_tokenizer, max_length=64, **files
    )  # fmt: skip
    with pytest.raises(ValueError, match="decoder_only=True, but T5ForConditionalGeneration has an encoder. Set"):
        trainer(tmp_path, max_steps=1).fit(Choices(config=t5), data)


METHODS = {
    "IA3": lp.IA3(),
    "a prompt": lp.PromptTuning(length=3),
    "a prompt for each task": lp.PromptTuning(length=3, tasks=2),
    "prefixes": lp.PrefixTuning(length=3),
}


@pytest.mark.parametrize("name", METHODS)
def test_adapters_see_what_one_call_for_each_choice_shows_them(kind: dict[str, Any], name: str) -> None:
    """Also where rows have different numbers of choices, and each the prompt of its own task."""
    if name == "prefixes" and kind["model_type"] == "bart":
        pytest.skip("one architecture with cross-attention is enough")
    seed_everything(0, verbose=False)
    module = Choices(config=kind).eval()
    lp.inject(module, METHODS[name])
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    given, tasks = batch(), torch.tensor([1, 0])
    scores = Likelihoods(module(**given, task_ids=tasks), given["choices"]).scores
    for row, task in enumerate(tasks.tolist()):
        several = name == "a prompt for each task"
        with lp.row_tasks(module, task) if several else nullcontext():
            wanted = naive(module, {key: value[row : row + 1] for key, value in given.items()})
        assert torch.allclose(scores[row], wanted[0], atol=1e-5)
