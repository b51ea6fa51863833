"""Mistakes on the command line: each is one paragraph that names what is near, with an exit code that is not 0."""

import difflib

import pytest
import yaml

from lightning_peft.cli.main import main

MODEL = ["--model", "cli_models.Net", "--data", "cli_models.Numbers", "--seed_everything", "3"]
TEXTS = {"class_path": "TextClassification", "init_args": {"config": {"model_type": "bert"}, "num_classes": 2}}


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-peft"])


@pytest.fixture
def said(capsys, tmp_path, monkeypatch):
    """Return a function that runs a command line in an empty folder and returns the paragraph that it ends with."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        captured = capsys.readouterr()
        assert captured.out == ""
        assert end.value.code not in (0, None)
        text = end.value.code if isinstance(end.value.code, str) else captured.err
        assert text.count("\n") == text.endswith("\n")
        return text

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--trainer.max_epohcs", "1"], "There is no option --trainer.max_epohcs. Nearest: --trainer.max_epochs"),
        (["--trainer.max_epoch", "1"], "There is no option --trainer.max_epoch. Nearest: --trainer.max_epochs"),
        (["--rank", "4"], "There is no option --rank. Nearest: --peft.method.rank."),
        (["--learning_rate", "4"], "There is no option --learning_rate. Nearest: --model.learning_rate."),
        (["--confg", "x"], "There is no option --confg. Nearest: --config."),
        (["extra"], "'extra' belongs to no option. Options begin with --."),
        (["--trainer.max_epochs", "abc"], "trainer.max_epochs: expected a whole number (int) or null, got 'abc'."),
        (["--peft.frozen_mode", "off"], "peft.frozen_mode: expected 'eval' or 'train', got 'off'."),
        (["--peft.method", "Lora"], "peft.method: there is no class 'Lora'. Nearest: LoRA"),
        (["--peft.method", "LoRA", "--peft.method.rnak", "4"], "LoRA has no setting 'rnak'. Nearest: rank. Fields of"),
        (["--peft.method", "LoRA", "--peft.method.rank", "x"], "peft.method.rank: expected a whole number (int), got"),
        (["--peft.method", "nowhere.Gate"], "No module named 'nowhere'. Modules are looked for among installed"),
        (["--peft.method", "cli_models.ScaleShft"], "has no attribute 'ScaleShft'. See lightning-peft fit --help."),
        (["--model", "TextClasification"], "model: there is no class 'TextClasification'. Nearest: TextClassification"),
    ],
)
def test_a_wrong_option_is_one_paragraph_with_what_is_near(arguments, expected, said):
    text = said("fit", *MODEL, *arguments)
    assert text.startswith("lightning-peft fit: error: ")
    assert expected in text
    assert text.endswith(". See lightning-peft fit --help.\n")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pfet": {"method": "LoRA"}}, "The configuration has a section 'pfet', which does not exist. Nearest: peft."),
        ({"trainer": {"max_epohcs": 1}}, "the key 'trainer.max_epohcs', which does not exist. Nearest: trainer.max_ep"),
        ({"model": {**TEXTS, "init_args": {"num_clases": 2}}}, "has no setting 'num_clases'. Nearest: num_classes."),
        ({"peft": {"method": {"class_path": "Lora"}}}, "peft.method: there is no class 'Lora'. Nearest: LoRA"),
    ],
)
def test_a_wrong_key_of_a_configuration_is_named_with_what_is_near(settings, expected, said, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": "cli_models.Net", **settings}))
    assert expected in said("fit", "--config", str(path))


def test_a_configuration_that_is_no_file_is_said_with_files_near_it(said, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/lora.yaml").touch()
    assert "The configuration configs/loar.yaml is no file. Nearest: configs/lora.yaml." in said(
        "fit", "--config", "configs/loar.yaml"
    )
    assert "configs is a folder. Files in it: lora.yaml." in said("fit", "--config=configs")
    assert "The configuration none.yaml is no file." in said("features", "-c", "none.yaml")


def test_a_configuration_that_is_no_yaml_is_said_with_the_line(said, tmp_path):
    (tmp_path / "tab.yaml").write_text("model:\n\tclass_path: Net\n")
    text = said("fit", "--config", "tab.yaml")
    assert "tab.yaml is no YAML in line 2, column 1: " in text
    assert text.endswith("YAML is indented by spaces, not by tabs.")
    (tmp_path / "open.yaml").write_text("model: [1, 2\ndata: {\n")
    assert "open.yaml is no YAML in line 2, column" in said("fit", "--config", "open.yaml")


def test_what_is_missing_and_which_commands_there_are_is_said(said):
    assert "lightning-peft: error: fit needs --model: give the option, or a --config FILE that has it." in said("fit")
    assert "merge needs --adapter, --output" in said("merge", *MODEL)
    assert "lightning-peft inspect: error: This command needs ADAPTER. See" in said("inspect")
    assert "There is no command 'flt'. Nearest: fit" in said("flt")
    assert "There is no command 'curvs'. Nearest: curves" in said("plot", "curvs", "x")
    assert "There is no option --jsn. Nearest: --json." in said("inspect", "--jsn", "x")


def test_without_a_command_the_help_is_shown_as_a_mistake(capsys):
    with pytest.raises(SystemExit) as end:
        main([])
    captured = capsys.readouterr()
    assert (end.value.code, captured.out) == (2, "")
    assert captured.err.startswith("usage: lightning-peft")
    assert "Show what an adapter holds" in captured.err or "Print the content of an adapter file" in captured.err


def test_a_gpu_that_is_not_there_is_said_before_a_model_is_built(said, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    text = said("fit", *MODEL, "--peft.method", "LoRA", "--trainer.accelerator", "gpu")
    assert "trainer.accelerator is 'gpu', and torch finds no GPU here" in text
    assert "--trainer.accelerator cpu --trainer.devices 1 --trainer.strategy auto" in text


def test_what_lightning_says_of_settings_is_a_sentence(said):
    text = said("fit", *MODEL, "--peft.method", "LoRA", "--trainer.accelerator", "cpu", "--trainer.devices", "0")
    assert text.startswith("lightning-peft: MisconfigurationException: ")


def printed_config(arguments, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_another_method_takes_no_settings_of_the_one_in_the_file(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    method = {"class_path": "LoRA", "init_args": {"rank": 3, "targets": ["net.0"]}}
    path.write_text(yaml.safe_dump({"model": "cli_models.Net", "peft": {"method": method}}))
    own = ["attention.key", "attention.value"]
    for given in (["--peft.method", "IA3"], ["--peft.method=IA3"]):
        config = printed_config(["fit", "--config", str(path), *given], capsys)
        assert config["peft"]["method"]["class_path"] == "lightning_peft.IA3"
        assert config["peft"]["method"]["init_args"]["targets"] == own
    config = printed_config(["fit", "--config", str(path), "--peft.method", "lightning_peft.LoRA"], capsys)
    assert config["peft"]["method"]["init_args"]["targets"] == ["net.0"]
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"peft": {"method": "IA3"}}))
    config = printed_config(["fit", "--config", str(path), "--config", str(other)], capsys)
    assert config["peft"]["method"]["init_args"]["targets"] == own


def test_help_shows_what_is_chosen_most_before_the_trainer(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: lightning-peft fit --config FILE [--peft.method NAME]")
    assert lines[1] == ""
    places = [
        next(i for i, line in enumerate(lines) if line.startswith(f"  --{name}"))
        for name in ("peft.method METHOD", "model CONFIG", "data CONFIG", "optimizer CONFIG", "trainer.max_epochs")
    ]
    assert places == sorted(places)
    assert places[0] < 90
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert [title.partition(":")[0] for title in titles] == [
        "options",
        "options of fit alone",
        "peft",
        "model",
        "data",
        "optimizer",
        "lr_scheduler",
        "trainer",
    ]
    assert any("--all_messages" in line for line in lines)


def test_modules_of_the_working_directory_are_found(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_gate_of_a_test.py").write_text(
        "import lightning_peft as lp\nclass Gate(lp.LoRA):\n    pass\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in __import__("sys").path if path])
    config = printed_config(["fit", *MODEL, "--peft.method", "my_gate_of_a_test.Gate"], capsys)
    assert config["peft"]["method"]["class_path"] == "my_gate_of_a_test.Gate"


def test_names_are_near_that_begin_alike_or_end_alike():
    from lightning_peft.cli.complaints import nearest

    names = ["trainer.max_epochs", "trainer.min_epochs", "peft.method.rank", "model.dtype"]
    assert nearest("trainer.max_epoch", names) == " Nearest: trainer.max_epochs, trainer.min_epochs."
    assert nearest("rank", names) == " Nearest: peft.method.rank."
    assert nearest("zzz", names) == ""
    assert difflib.get_close_matches("rank", names) == []
