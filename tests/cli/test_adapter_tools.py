"""``lightning-peft export`` and ``import``: what a run trained, to HF PEFT and back, from the run's own config file."""

import importlib.util
import json
import shutil

import pytest
import torch
import yaml
from models import MODELS, logits
from safetensors.torch import load_file

import lightning_peft as lp
from lightning_peft.cli.main import main

LORA = {"class_path": "LoRA", "init_args": {"rank": 4, "alpha": 6.0}}


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-peft"])


@pytest.fixture
def config(tmp_path):
    """Return a function that writes the config file of a run of one of the tests' models."""

    def written(model="llama", method=LORA, **peft):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "max_epochs": 1}
        logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "runs"}}
        run = {
            "seed_everything": 3,
            "model": {"class_path": "trainer_models.Module", "init_args": {"model": model}},
            "data": {"class_path": "cli_models.Tokens"},
            "peft": {"method": method, **peft},
            "trainer": {**quiet, "logger": logger, "log_every_n_steps": 1},
        }
        path = tmp_path / f"{model}.yaml"
        path.write_text(yaml.safe_dump(run))
        return str(path)

    return written


@pytest.fixture
def fitted(config, tmp_path):
    """The config file of a run, its folder and its model's logits."""
    path = config()
    main(["fit", "--config", path, "--test_after_fit", "true"])
    run = tmp_path / "runs/version_0"
    model = lp.load_adapter(MODELS["llama"](), run / "adapter").eval()
    return path, run, logits(model(**MODELS["llama"].inputs()))


class Recorder:
    """Stands in for the hub."""

    calls = []

    def create_repo(self, repo_id, **settings):
        self.calls.append((repo_id, settings))
        return f"https://hub.invalid/{repo_id}"

    def upload_folder(self, **settings):
        self.calls.append(settings)


def adapter_bytes(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_to_peft_and_comes_back_to_the_bit(fitted, tmp_path, capsys):
    import peft

    path, run, expected = fitted
    capsys.readouterr()
    main(["export", "--config", path, "--adapter", str(run / "adapter"), "--output", str(tmp_path / "peft")])
    printed = capsys.readouterr().out
    assert f"peft adapter: {tmp_path / 'peft'}\n" in printed
    assert "vLLM 0.33.0 takes it as it is" in printed
    theirs = peft.PeftModel.from_pretrained(MODELS["llama"](), tmp_path / "peft").eval()
    assert (expected - logits(MODELS["llama"]()(**MODELS["llama"].inputs()))).abs().max() > 1e-3
    assert (logits(theirs(**MODELS["llama"].inputs())) - expected).abs().max() < 1e-5
    main(["import", "--config", path, "--adapter", str(tmp_path / "peft"), "--output", str(tmp_path / "back")])
    assert f"adapter: {tmp_path / 'back'}\n" in capsys.readouterr().out
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (run / "adapter", tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    back = lp.load_adapter(MODELS["llama"](), tmp_path / "back").eval()
    assert torch.equal(logits(back(**MODELS["llama"].inputs())), expected)


def test_the_card_has_the_results_of_the_run(fitted, tmp_path):
    path, run, _ = fitted
    loss = json.loads((run / "report.json").read_text())["val_loss"]
    (best,) = (run / "checkpoints").glob("*.ckpt")
    for number, adapter in enumerate((run / "adapter", best)):
        output = tmp_path / f"out {number}"
        main(["export", "--config", path, "--adapter", str(adapter), "--output", str(output)])
        assert f"| val_loss | {loss:.6g} |" in (output / "README.md").read_text()
        assert "bytes |" not in (output / "README.md").read_text()
    assert adapter_bytes(tmp_path / "out 0") == adapter_bytes(tmp_path / "out 1")


def test_results_of_another_checkpoint_are_not_taken_but_may_be_given(fitted, tmp_path, capsys):
    path, run, _ = fitted
    (best,) = (run / "checkpoints").glob("*.ckpt")
    shutil.copy(best, best.with_name("other.ckpt"))
    (tmp_path / "more.json").write_text(json.dumps({"accuracy": 0.75, "adapter": "x", "adapter_bytes": 12}))
    export = ["export", "--config", path, "--adapter", str(best.with_name("other.ckpt"))]
    main([*export, "--output", str(tmp_path / "one")])
    assert "## Metrics" not in (tmp_path / "one/README.md").read_text()
    assert "model card: 0 metrics" in capsys.readouterr().out
    main([*export, "--output", str(tmp_path / "two"), "--metrics", str(tmp_path / "more.json")])
    text = (tmp_path / "two/README.md").read_text()
    assert "| metric | value |\n| --- | --- |\n| accuracy | 0.75 |\n\n" in text


def test_what_fit_has_written_as_its_config_serves_the_tools(fitted, tmp_path, capsys):
    _, run, _ = fitted
    given = [f"--config={run / 'config.yaml'}", f"--adapter={run / 'adapter'}"]
    main(["export", *given, f"--output={tmp_path / 'out'}"])
    assert lp.vllm_problems(tmp_path / "out") == []
    main(["merge", *given, f"--output={tmp_path / 'merged'}"])
    assert "merged model: " in capsys.readouterr().out


def test_problems_of_vllm_are_printed(config, tmp_path, capsys):
    dora = {"class_path": "LoRA", "init_args": {"rank": 4, "decompose": True}}
    path = config(method=dora)
    model = lp.inject(MODELS["llama"](), lp.LoRA(rank=4, decompose=True))
    lp.save_adapter(model, tmp_path / "adapter")
    main(["export", "--config", path, "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out")])
    assert "vLLM refuses DoRA (use_dora)." in capsys.readouterr().out


@pytest.mark.slow
def test_checkpoints_of_loralib_and_t_few_are_imported(config, tmp_path):
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(size, generator=generator) for size in ((2, 32), (32, 2)))
    host = "bert.encoder.layer.1.attention.self.query"
    torch.save({f"{host}.lora_A": a, f"{host}.lora_B": b}, tmp_path / "lora.bin")
    output = tmp_path / "lora"
    read = ["--adapter", str(tmp_path / "lora.bin"), "--output", str(output), "--format", "loralib"]
    with pytest.raises(SystemExit, match="does not hold its scale; give alpha"):
        main(["import", "--config", config("bert"), *read])
    assert not output.exists()
    main(["import", "--config", config("bert"), *read, "--alpha", "8"])
    model = lp.load_adapter(MODELS["bert"](), output)
    merged = lp.merge(model).get_submodule(host).weight
    plain = MODELS["bert"]().get_submodule(host).weight
    torch.testing.assert_close(merged - plain, 8 / 2 * b @ a, atol=1e-5, rtol=1e-5)

    host = "encoder.block.0.layer.0.SelfAttention.v"
    scales = torch.rand(24, 1, generator=generator)
    torch.save({f"{host}.multi_lora_b": scales}, tmp_path / "finish.pt")
    read = ["--adapter", str(tmp_path / "finish.pt"), "--output", str(tmp_path / "ia3"), "--format", "t-few"]
    main(["import", "--config", config("t5"), *read])
    (value,) = load_file(tmp_path / "ia3/adapter_model.safetensors").values()
    assert torch.equal(value, scales.flatten())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "--output", "full"], "full is not empty; choose a new folder"),
        (["import", "--output", "full"], "full is not empty; choose a new folder"),
        (["export", "--output", "out", "--metrics", "none.json"], "none.json is no file; expected numbers by name"),
        (["export", "--output", "out", "--metrics", "llama.yaml"], "llama.yaml is no JSON"),
        (["export", "--output", "out", "--push_to", "a/b/c"], "'a/b/c' names no repository; expected user/name"),
        (["export", "--output", "out", "--private", "true"], "is a setting of push_to, which is not given"),
        (["export", "--output", "out", "--adapter", "nothing"], "nothing is neither a folder that save_adapter wrote"),
        (["import", "--output", "out", "--alpha", "3"], "settings of format=loralib, and the format is peft"),
        (["import", "--output", "out"], "is no adapter folder of HF PEFT"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(arguments, said, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").touch()
    command, *rest = arguments
    given = [] if "--adapter" in rest else ["--adapter", str(tmp_path / "adapter")]
    with pytest.raises(SystemExit, match=said):
        main([command, "--config", config(), *given, *rest])
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes"]


def test_an_export_is_pushed_if_asked(config, tmp_path, monkeypatch, capsys):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "HfApi", Recorder)
    monkeypatch.setattr(Recorder, "calls", [])
    lp.save_adapter(lp.inject(MODELS["llama"](), lp.LoRA(rank=4)), tmp_path / "adapter")
    arguments = ["--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out"), "--push_to", "me/small"]
    main(["export", "--config", config(), *arguments, "--private", "true"])
    assert Recorder.calls[0] == ("me/small", {"private": True, "exist_ok": True})
    assert Recorder.calls[1]["folder_path"] == tmp_path / "out"
    assert "pushed: https://hub.invalid/me/small\n" in capsys.readouterr().out
