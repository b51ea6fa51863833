from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_peft as lp
from lightning_peft.tasks import CausalLM, InstructionDataModule, MixedDataModule, TextClassification, TextDataModule
from lightning_peft.tasks.data.task_sampling import MAX_ROWS_PER_TASK, Mixture

Write = Callable[..., str]
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}


@pytest.fixture
def data(encoder_tokenizer: str, write: Write) -> Callable[..., MixedDataModule]:
    """Twelve reviews and their colours, which the same words tell, as two tasks with the same labels."""
    words = ["good", "bad", "fine", "awful"]
    rows = [{"text": f"the {noun} was {word}"} for noun in ("film", "plot", "ending") for word in words]
    files = {
        task: write(f"{task}.jsonl", [{**row, "label": "yn"[(i >> bit) % 2]} for i, row in enumerate(rows)])
        for bit, task in enumerate(("mood", "colour"))
    }

    def build(**settings: Any) -> MixedDataModule:
        tasks = {
            task: TextDataModule(file, file, file, tokenizer=encoder_tokenizer, max_length=16)
            for task, file in files.items()
        }
        return MixedDataModule(tasks, **{"batch_size": 5, "seed": 3, **settings})

    return build


def test_a_proportional_pass_is_every_row_once_and_a_huge_task_is_clipped() -> None:
    mixture = Mixture([5, 3, 9], 4, "proportional", 1)
    for _ in range(2):
        batches = list(islice(mixture, len(mixture)))
        assert [len(batch) for batch in batches] == [4, 4, 4, 4, 1]
        assert sorted(i for batch in batches for i in batch) == list(range(17))
    huge = Mixture([MAX_ROWS_PER_TASK + 10, 4], 1024, "proportional", 1)
    rows = [i for batch in islice(huge, len(huge)) for i in batch]
    assert len(rows) == len(set(rows)) == MAX_ROWS_PER_TASK + 4
    assert sorted(rows)[-4:] == [MAX_ROWS_PER_TASK + 10 + i for i in range(4)]


def test_stochastic_batches_follow_the_papers_law() -> None:
    """n is uniform in 2 to K; the share of a task is its share of clipped rows; rows come round in equal numbers."""
    sizes, size, draws = [60, 30, 10], 7, 6000
    mixture, count, kinds = Mixture(sizes, size, "stochastic", 0), Counter[int](), Counter[tuple[int, ...]]()
    for batch in islice(mixture, draws):
        count.update(batch)
        tasks = [0 if i < 60 else 1 if i < 90 else 2 for i in batch]
        assert len(batch) == size
        kinds[tuple(sorted(Counter(tasks).values()))] += 1
    share = [
        sum(n for i, n in count.items() if lo <= i < hi) / (draws * size) for lo, hi in [(0, 60), (60, 90), (90, 100)]
    ]
    assert share == pytest.approx([0.6, 0.3, 0.1], abs=0.015)
    p = torch.tensor([0.6, 0.3, 0.1])
    all_three = 0.5 * 6 * p.prod()  # n = 3, and three different tasks: 3 + 2 + 2 rows
    assert kinds[(2, 2, 3)] / draws == pytest.approx(all_three.item(), abs=0.02)
    two_of_two = 0.5 * (1 - (p**2).sum())  # n = 2, and different ones: 4 + 3 rows
    two_of_three = 0.5 * (3 * p**2 * (1 - p)).sum()  # n = 3, one twice: 5 + 2, or 4 + 3 where the first was alone
    assert (kinds[(3, 4)] + kinds[(2, 5)]) / draws == pytest.approx((two_of_two + two_of_three).item(), abs=0.02)
    for lo, hi in [(0, 60), (60, 90), (90, 100)]:  # cursors wrap around after all rows were taken
        taken = [count[i] for i in range(lo, hi)]
        assert max(taken) - min(taken) <= 1


def test_the_seed_decides_batches_and_bad_settings_are_refused(data: Callable[..., MixedDataModule]) -> None:
    def first(seed: int) -> list[list[int]]:
        return list(islice(Mixture([5, 8], 4, "stochastic", seed), 9))

    assert first(1) == first(1) != first(2)
    with pytest.raises(ValueError, match="batch_size must be 3 or more for 3 tasks, got 2"):
        Mixture([4, 4, 4], 2, "stochastic", 0)
    with pytest.raises(ValueError, match="sampling must be 'proportional' or 'stochastic', got 'even'"):
        data(sampling="even")


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loader_goes_on_where_its_state_was_taken(data: Callable[..., MixedDataModule], workers: int) -> None:
    def batches(loader: Any, count: int) -> Iterator[list[Any]]:
        for batch in islice(loader, count):
            yield [batch["input_ids"].tolist(), batch["task_ids"].tolist()]

    module = data(sampling="stochastic", num_workers=workers)
    loader = module.train_dataloader()
    _ = [*batches(loader, 5), *batches(loader, 4)]  # an epoch of all five, and one cut short
    state = loader.state_dict()
    rest = [*batches(loader, 5), *batches(loader, 5)]
    resumed = data(sampling="stochastic", num_workers=0, seed=99).train_dataloader()
    resumed.load_state_dict(state)
    assert [*batches(resumed, 5), *batches(resumed, 5)] == rest
    with pytest.raises(ValueError, match="other batches: batch_size=5, here 6"):
        data(sampling="stochastic", batch_size=6).train_dataloader().load_state_dict(state)


def test_two_processes_share_one_stream(data: Callable[..., MixedDataModule]) -> None:
    from lightning_peft.tasks.data.mixed_loader import MixedLoader

    module = data()
    rows, mixture = module._rows("train"), ([12, 12], 4, "proportional", 5)

    def load(rank: int, world: int) -> list[list[list[int]]]:
        loader = MixedLoader(rows, mixture, module.collate, rank=rank, world=world)
        return [b["input_ids"].tolist() for _ in range(2) for b in loader]

    whole, first, second = load(0, 1), load(0, 2), load(1, 2)
    assert whole[::2] == first
    assert whole[1::2] == second


def test_evaluation_has_every_row_of_every_task_in_order(data: Callable[..., MixedDataModule]) -> None:
    module = data()
    ids = torch.cat([batch["task_ids"] for batch in module.val_dataloader()])
    assert ids.tolist() == [0] * 12 + [1] * 12
    labels = torch.cat([batch["labels"] for batch in module.val_dataloader()])
    assert labels.tolist() == [row["labels"] for task in module.tasks.values() for row in task.examples("validation")]


def fit(folder: Path, data: MixedDataModule, bert: dict[str, Any], resume: str | None = None) -> tuple[Trainer, Any]:
    seed_everything(7, verbose=False)
    module = TextClassification(config=bert, num_classes=2, learning_rate=0.05)
    seed_everything(8 if resume is None else 9, verbose=False)
    strategy = lp.PEFTStrategy(lp.PromptTuning(length=3, tasks=2), show_summary=False)
    saved = ModelCheckpoint(folder / str(resume is None), "{step}", every_n_train_steps=7, save_top_k=-1)
    run = Trainer(max_epochs=3, default_root_dir=folder, callbacks=[strategy, saved], **QUIET)
    run.fit(module, data, ckpt_path=resume)
    return run, module


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("sampling", ["proportional", "stochastic"])
def test_a_run_resumed_inside_an_epoch_ends_with_the_same_bits(
    tmp_path: Path, data: Callable[..., MixedDataModule], bert: dict[str, Any], sampling: str
) -> None:
    run, module = fit(tmp_path, data(sampling=sampling, seed=None), bert)
    assert set(run.callback_metrics) >= {
        "val_accuracy",
        "val_accuracy/mood",
        "val_accuracy/colour",
        "val_macro_f1/mood",
    }
    again, resumed = fit(tmp_path, data(sampling=sampling, seed=None), bert, str(tmp_path / "True" / "step=7.ckpt"))
    assert again.global_step == run.global_step == 15
    state, other = module.state_dict(), resumed.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    mean = (run.callback_metrics["val_accuracy/mood"] + run.callback_metrics["val_accuracy/colour"]) / 2
    assert run.callback_metrics["val_accuracy"] == pytest.approx(mean.item())


def test_a_mixed_batch_gives_what_batches_of_one_task_give(
    data: Callable[..., MixedDataModule], bert: dict[str, Any]
) -> None:
    source = data()
    batch = next(iter(source.train_dataloader()))
    module = TextClassification(config=bert, num_classes=2).eval()
    lp.inject(module, lp.PromptTuning(length=3, tasks=2))
    mixed = module(**batch)
    assert len(set(batch["task_ids"].tolist())) == 2
    for task in (0, 1):
        rows = batch["task_ids"] == task
        with lp.row_tasks(module.network, task):
            alone = module(**{name: x[rows] for name, x in batch.items() if name != "task_ids"})
        torch.testing.assert_close(mixed[rows], alone)
    assert not torch.allclose(mixed, module(**{**batch, "task_ids": 1 - batch["task_ids"]}))


def test_generation_takes_the_prompt_of_each_rows_task(
    decoder_tokenizer: str, llama: dict[str, Any], write: Write, tmp_path: Path
) -> None:
    answers = {"shout": "red red film", "whisper": "blue plot"}
    tasks = {}
    for task, answer in answers.items():
        file = write(f"{task}.jsonl", [{"instruction": f"name {n}", "output": answer} for n in ("one", "two", "a")])
        tasks[task] = InstructionDataModule(
            file, file, predict=file, input=None, prompt_style="plain", tokenizer=decoder_tokenizer, max_length=99
        )
    mixed = MixedDataModule(tasks, batch_size=4, seed=0)
    seed_everything(1, verbose=False)
    module = CausalLM(config=llama, learning_rate=0.02, max_new_tokens=4)
    methods = [lp.PromptTuning(length=4, tasks=2), lp.FullFineTuning()]
    run = Trainer(
        max_epochs=40,
        check_val_every_n_epoch=40,
        callbacks=[lp.PEFTStrategy(methods, show_summary=False)],
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        **QUIET,
    )
    run.fit(module, mixed)
    assert run.callback_metrics["val_loss/whisper"] < 0.1
    texts = [text for batch in run.predict(module, mixed) for text in batch]
    assert texts == ["red red film"] * 3 + ["blue plot"] * 3
    with lp.row_tasks(module.network, 1):
        assert module.generate("name two") == ["blue plot"]


def test_tasks_that_do_not_belong_together_are_refused(
    data: Callable[..., MixedDataModule], encoder_tokenizer: str, decoder_tokenizer: str, reviews: str
) -> None:
    tasks = data().tasks
    one = tasks["mood"]
    with pytest.raises(ValueError, match="'mood: TextDataModule', expected two or more of one class"):
        MixedDataModule({"mood": one})
    with pytest.raises(ValueError, match="expected two or more of one class"):
        MixedDataModule({"mood": one, "talk": InstructionDataModule(reviews)})
    strange = TextDataModule(reviews, tokenizer=decoder_tokenizer)
    with pytest.raises(ValueError, match="'strange' has another tokenizer"):
        MixedDataModule({"mood": one, "strange": strange}).setup("fit")
    other = TextDataModule(reviews, validation_fraction=0, tokenizer=encoder_tokenizer)
    mixed = MixedDataModule({"mood": one, "other": other})
    with pytest.raises(ValueError, match="tasks 'other' have other classes than the first, 'n', 'y'"):
        mixed.train_dataloader()
    with pytest.raises(ValueError, match="tasks 'other' have no validation file"):
        mixed.val_dataloader()
    with pytest.raises(ValueError, match="the tasks 'a', 'b', the data 'mood', 'colour'"):
        data().load_state_dict({"tasks": {"a": {}, "b": {}}})
