"""The command line: what it trains, what it writes, and what it says when something is wrong."""

import json
import sys

import cli_models
import pytest
import torch
from safetensors.torch import load_file

import lightning_peft as lp
from lightning_peft.checkpoints.key_prefix import align_keys
from lightning_peft.cli.main import COMMANDS, PEFTCLI, main
from lightning_peft.core.adapted_module import method_name
from lightning_peft.recipes.features import features
from lightning_peft.recipes.federated import federated
from lightning_peft.recipes.multitask_prompt_tuning import mpt


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])


@pytest.fixture
def arguments(tmp_path):
    quiet = ["enable_progress_bar", "enable_model_summary"]
    return [
        *["--model", "cli_models.Net", "--data", "cli_models.Numbers", "--peft.method", "LoRA"],
        *["--peft.method.rank", "2", "--peft.method.targets", "[net.0,net.2]", "--peft.also_train", "[net.4]"],
        *[
            "--optimizer",
            "AdamW",
            "--optimizer.lr",
            "0.05",
            "--trainer.max_epochs",
            "2",
            "--trainer.accelerator",
            "cpu",
        ],
        *["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path), "--seed_everything", "3"],
        *[word for name in quiet for word in (f"--trainer.{name}", "false")],
    ]


@pytest.mark.parametrize("late", ["false", "true"])
def test_optimizers_from_the_command_line_hold_exactly_what_trains(arguments, late):
    cli = PEFTCLI(args=["fit", *arguments, "--model.late", late])
    (optimizer,) = cli.trainer.optimizers
    held = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in cli.model.parameters() if p.requires_grad]
    assert {id(p) for p in held} == {id(p) for p in trained}
    assert len(held) == len(trained) == 2 * 2 + 2
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == 0.05
    base = cli_models.network()
    assert torch.equal(cli.model.net[0].weight, base[0].weight)
    assert not torch.equal(cli.model.net[4].weight, base[4].weight)
    assert all(adapter.b.abs().sum() > 0 for *_, adapter in lp.adapters(cli.model))


def test_a_scheduler_from_the_command_line_drives_that_optimizer(arguments):
    cli = PEFTCLI(args=["fit", *arguments, "--lr_scheduler", "ExponentialLR", "--lr_scheduler.gamma", "0.1"])
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.1**2)


def test_fit_saves_the_adapter_and_reports(arguments, tmp_path, capsys):
    cli = PEFTCLI(args=["fit", *arguments, "--test_after_fit", "true", "--adapter_dir", str(tmp_path / "adapter")])
    (path,) = tmp_path.rglob("report.json")
    report = json.loads(path.read_text())
    assert report["trainable_parameters"] == 2 * (6 + 12) + 2 * (12 + 8) + 8 * 3 + 3
    assert report["test_accuracy"] == cli.trainer.callback_metrics["test_accuracy"].item()
    assert report["adapter"] == str(tmp_path / "adapter")
    printed = capsys.readouterr().out
    assert "trainable parameters" in printed
    assert str(tmp_path / "adapter") in printed
    assert report["checkpoint"] in printed
    fresh = lp.load_adapter(cli_models.Net(), tmp_path / "adapter")
    x = torch.randn(4, 6)
    assert torch.equal(fresh.net(x), cli.model.net(x))


def test_merge_writes_the_folded_weights(arguments, tmp_path):
    cli = PEFTCLI(args=["fit", *arguments, "--adapter_dir", str(tmp_path / "adapter")])
    x = torch.randn(4, 6)
    expected = cli.model.net(x)
    for adapter, output in ((tmp_path / "adapter", "one"), (cli.trainer.checkpoint_callback.best_model_path, "two")):
        main(["merge", *arguments, "--adapter", str(adapter), "--output", str(tmp_path / output)])
        plain = cli_models.Net()
        plain.load_state_dict(load_file(tmp_path / output / "model.safetensors"))
        torch.testing.assert_close(plain.net(x), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(SystemExit, match="not empty"):
        main(["merge", *arguments, "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "one")])


def test_inspect_shows_methods_and_tensors(tmp_path, capsys):
    model = lp.inject(cli_models.Net(), lp.LoRA(rank=2, targets=["net.0"]))
    lp.save_adapter(model, tmp_path)
    main(["inspect", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "LoRA(name='lora', targets=['net.0']" in printed
    assert "net.0  36  lora" in printed
    assert "(12, 2)" in printed
    assert f"{2 * (6 + 12)} parameters" in printed
    main(["inspect", str(tmp_path), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"] == 36
    assert [t["shape"] for t in report["tensors"]] == [[2, 6], [12, 2]]
    with pytest.raises(SystemExit, match="is no adapter folder"):
        main(["inspect", str(tmp_path / "nothing")])


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--peft.method", "LORA"], ["LoRA", "PromptTuning", "LLaMAAdapter"]),
        (["--peft.method.rnak", "4"], ["rnak", "Fields of LoRA: name, targets, exclude, rank, alpha"]),
        (["--peft.method.rank", "abc"], ["rank", "int"]),
        (["--peft.method.rank", ".nan"], ["rank", "int"]),
        (["--peft.frozen_mode", "off"], ["eval", "train"]),
    ],
    ids=["method", "field", "type", "nan", "choice"],
)
def test_a_bad_field_or_value_names_the_choices(arguments, extra, said, capsys):
    with pytest.raises(SystemExit):
        main(["fit", *arguments, *extra])
    message = capsys.readouterr().err
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--peft.method.targets", "[net.0,nte.2]"], r"'nte\.2' matches nothing in the model\. Close names: net\.\*"),
        (["--peft.method.rank", "9"], r"rank at net\.0 must be at most 6, got 9"),
        (["--peft.method.rank", "0"], r"rank must be a positive whole number, got 0"),
    ],
    ids=["typo", "large", "zero"],
)
def test_what_does_not_fit_the_model_ends_in_one_paragraph(arguments, extra, said, tmp_path):
    with pytest.raises(SystemExit, match=said) as end:
        main(["fit", *arguments, *extra])
    assert "\n" not in str(end.value)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_bug_of_this_package_keeps_its_traceback(monkeypatch):
    monkeypatch.setitem(COMMANDS, "inspect", lambda arguments: method_name(*arguments))
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        main(["inspect", "key"])
    monkeypatch.setitem(COMMANDS, "inspect", lambda arguments: align_keys(arguments, None))
    with pytest.raises(TypeError, match="'NoneType' object is not iterable"):
        main(["inspect", "key"])


def test_the_help_lists_all_commands_with_what_they_do(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    names = [*PEFTCLI.subcommands(), *COMMANDS]
    assert f"{{{','.join(names)}}}" in printed
    assert [name for name in names if printed.count(f" {name} ") == 0] == []
    for function in (features, federated, mpt):
        said = (function.__doc__ or "").partition("\n")[0]
        assert f"{function.__name__} {said}" in printed
        assert COMMANDS[function.__name__].__doc__ == said
    with pytest.raises(SystemExit):
        main(["plots"])
    assert f"no command 'plots'. Nearest: plot. Choose from {', '.join(names)}." in capsys.readouterr().err


def test_a_command_behind_options_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--config", "{}", "inspect"])
    assert "inspect has to be the first argument: lightning-peft inspect ..." in capsys.readouterr().err


def test_a_start_builds_the_arguments_of_its_own_subcommand_alone(arguments):
    cli = PEFTCLI(args=["fit", *arguments, "--trainer.fast_dev_run", "1"])
    sizes = {name: len(parser._actions) for name, parser in cli._subcommand_parsers.items()}
    assert {name for name, size in sizes.items() if size > 10} == {"fit"}
    assert set(sizes) == set(PEFTCLI.subcommands())


def test_help_explains_each_field(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--peft.method.help", "LoRA"])
    printed = capsys.readouterr().out
    assert "Rank r of the update" in printed
    assert "Probability with which inputs of A are dropped" in printed
