from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy

import lightning_peft as lp
from lightning_peft.tasks import Seq2Seq, Seq2SeqDataModule

Write = Callable[..., str]
PAIRS = [("film one", "good film"), ("plot two", "bad"), ("film two", "fine film a plot")]


@pytest.fixture
def bart() -> dict[str, Any]:
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 32, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    return {"model_type": "bart", "forced_eos_token_id": 3, **sizes, **heads, **tokens}


@pytest.fixture(params=["t5", "bart"])
def kind(request: pytest.FixtureRequest, t5: dict[str, Any], bart: dict[str, Any]) -> dict[str, Any]:
    return {"t5": {**t5, "eos_token_id": 3}, "bart": bart}[request.param]


@pytest.fixture
def pairs(encoder_tokenizer: str, write: Write) -> Seq2SeqDataModule:
    path = write("pairs.jsonl", [{"source": source, "target": target} for source, target in PAIRS])
    files = {"train": path, "validation": path, "test": path, "predict": path}
    return Seq2SeqDataModule(
        **files, tokenizer=encoder_tokenizer, batch_size=2, max_source_length=32, max_target_length=16
    )


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    settings = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), **quiet, **settings}
    return Trainer(default_root_dir=folder, accelerator="cpu", callbacks=list(callbacks), **settings)


def learn(module: Seq2Seq, data: Seq2SeqDataModule, steps: int = 50, rate: float = 2e-2) -> None:
    """Learn the rows by heart, without a Trainer, which takes its time."""
    data.setup("fit")
    given = data.collate(data.examples("train")[:])
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        loss = cross_entropy(*module.labelled(given))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def batch() -> dict[str, torch.Tensor]:
    sources = torch.tensor([[2, 5, 6, 3], [2, 9, 3, 0]])
    labels = torch.tensor([[2, 4, 3, -100], [2, 7, 8, 3]])
    return {"input_ids": sources, "attention_mask": (sources != 0).long(), "labels": labels}


def test_the_loss_is_the_models_own_over_tokens_of_targets(kind: dict[str, Any]) -> None:
    seed_everything(0, verbose=False)
    module, given = Seq2Seq(config=kind).eval(), batch()
    logits, targets = module.labelled(given)
    wanted = module.network(**given)
    assert logits.shape == (7, 32)
    assert cross_entropy(logits, targets).item() == pytest.approx(wanted.loss.item(), abs=1e-6)
    assert torch.allclose(module(**given), wanted.logits, atol=1e-6)
    before = torch.tensor([[kind.get("decoder_start_token_id", 0), 2, 4]])
    one = module.network(input_ids=given["input_ids"][:1], decoder_input_ids=before).logits
    assert torch.allclose(one[0], logits[:3], atol=1e-6)


def test_models_without_a_method_that_shifts_labels_shift_them_themselves(kind: dict[str, Any]) -> None:
    seed_everything(0, verbose=False)
    module, given = Seq2Seq(config=kind).eval(), batch()
    wanted = module(**given)
    module.network.prepare_decoder_input_ids_from_labels = None
    assert torch.equal(module(**given), wanted)


@pytest.mark.parametrize("kind", ["t5", pytest.param("bart", marks=pytest.mark.slow)], indirect=True)
def test_pairs_are_learned_by_heart_written_and_scored(
    kind: dict[str, Any], pairs: Seq2SeqDataModule, tmp_path: Path
) -> None:
    seed_everything(1, verbose=False)
    module = Seq2Seq(config=kind, max_new_tokens=8)
    learn(module.eval(), pairs)
    (results,) = trainer(tmp_path).test(module, pairs, verbose=False)
    assert set(results) == {"test_loss", "test_rouge1", "test_rouge2", "test_rougeL", "test_bleu"}
    assert results["test_loss"] < 0.1
    assert (results["test_rouge1"], results["test_rougeL"]) == (1, 1)
    assert 0 < results["test_bleu"] <= 1
    predictions = trainer(tmp_path).predict(module, pairs)
    assert [text for texts in predictions for text in texts] == [target for _, target in PAIRS]
    assert module.generate("plot two") == ["bad"]
    assert module.generate(["film two", "film one"], num_beams=2) == ["fine film a plot", "good film"]


def test_losses_are_means_over_tokens_whatever_the_batches_and_texts_can_be_left_out(
    kind: dict[str, Any], pairs: Seq2SeqDataModule, tmp_path: Path
) -> None:
    module = Seq2Seq(config=kind, generate_in_validation=False)
    (results,) = trainer(tmp_path).validate(module, pairs, verbose=False)
    losses = []
    for row in pairs.examples("validation"):
        with torch.no_grad():
            given = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask", "labels")}
            losses += cross_entropy(*module.eval().labelled(given), reduction="none").tolist()
    assert len(losses) == 13
    assert results == {"val_loss": pytest.approx(sum(losses) / len(losses), abs=1e-5)}


def test_scores_are_those_of_all_rows_and_begin_anew() -> None:
    module = pytest.importorskip("lightning_peft.tasks.text_metrics").TextMetrics()
    module.update(["the good film"], ["the good film"])
    module.update(["a plot", "red"], ["a bad plot", "blue"])
    found = module.results("val_")
    assert found["val_rouge1"].item() == pytest.approx((1 + 0.8 + 0) / 3)
    assert found["val_rougeL"].item() == pytest.approx((1 + 0.8 + 0) / 3)
    assert found["val_rouge2"].item() == pytest.approx(1 / 3)
    assert module.results("val_") == {}


METHODS = [
    lp.PrefixTuning(length=3), lp.LoRA(targets=["attention.query", "attention.value"]), lp.PromptTuning(length=3),
    lp.PTuning(length=3), lp.IA3(), lp.Bottleneck(size=4),
]  # fmt: skip


@pytest.mark.parametrize(
    "method", [METHODS[0], *(pytest.param(method, marks=pytest.mark.slow) for method in METHODS[1:])]
)
def test_methods_train_and_generate_with_an_encoder_and_a_decoder(
    kind: dict[str, Any], method: lp.Method, pairs: Seq2SeqDataModule
) -> None:
    seed_everything(1, verbose=False)
    module = Seq2Seq(config=kind, max_new_tokens=5).eval()
    without = module(**batch())
    lp.inject(module, method)
    frozen = [(p, p.detach().clone()) for p in module.network.parameters() if not p.requires_grad]
    learn(module, pairs, steps=3, rate=0.1)
    assert len(frozen) > 20
    assert all(torch.equal(parameter, value) for parameter, value in frozen)
    assert module(**batch()).shape == without.shape
    assert not torch.allclose(module(**batch()), without, atol=1e-5)
    module.tokenizer = pairs.tokenizer
    cached = module.generate(["film one", "a plot two"])
    assert cached == module.generate(["film one", "a plot two"], use_cache=False)
    assert cached == [*module.generate("film one"), *module.generate("a plot two")]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings(
    "ignore:.*persistent_workers", "ignore:.*fork", "ignore:Checkpoint directory", "ignore:The dirpath"
)
def test_training_goes_on_exactly_inside_an_epoch(
    workers: int, t5: dict[str, Any], encoder_tokenizer: str, tmp_path: Path, write: Write
) -> None:
    path = write("t.jsonl", [{"source": "film " * (1 + i % 5), "target": "good " * (1 + i % 3)} for i in range(12)])

    def run(folder: Path, steps: int, resumed: Path | None = None) -> dict[str, torch.Tensor]:
        seed_everything(3, verbose=False)
        module = Seq2Seq(config={**t5, "eos_token_id": 3}, schedule="constant", warmup_fraction=0)
        data = Seq2SeqDataModule(
            train=path, tokenizer=encoder_tokenizer, batch_size=2, num_workers=workers, validation_fraction=0,
            max_source_length=32,
        )  # fmt: skip
        saving = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=4, filename="{step}")
        strategy = lp.PEFTStrategy(lp.LoRA(targets=["attention.query"]), show_summary=False)
        trainer(folder, strategy, saving, max_steps=steps, limit_val_batches=0).fit(module, data, ckpt_path=resumed)
        return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}

    whole = run(tmp_path / "whole", 9)
    resumed = run(tmp_path / "resumed", 9, tmp_path / "whole" / "step=4.ckpt")
    assert len(whole) > 3
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_what_does_not_fit_is_refused_with_the_way_out(
    t5: dict[str, Any], bart: dict[str, Any], llama: dict[str, Any], pairs: Seq2SeqDataModule, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="is a decoder alone, which continues texts. Use CausalLM"):
        Seq2Seq(config=llama)
    for config, message in [
        (t5, "ends texts with token 3, but the model stops at eos_token_id=1.* set eos_token_id: 3 in config"),
        ({**t5, "vocab_size": 8}, "The tokenizer has 19 tokens, but the model knows 8"),
        ({**bart, "max_position_embeddings": 16}, "Got max_source_length=32, but the model has 16 positions. Lower"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path).validate(Seq2Seq(config=config), pairs, verbose=False)
    with pytest.raises(ValueError, match="Give Seq2Seq a tokenizer"):
        Seq2Seq(config=t5).generate("film")
