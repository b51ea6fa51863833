"""A killed process ends the whole run soon, with an error; the last checkpoint goes on as if nothing had happened."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cli_models import Net, Numbers
from processes import together

from lightning_peft.cli.main import main

EPOCHS = 40


class SlowNet(Net):
    """Draws random numbers in each step, and may take its time."""

    def training_step(self, batch, index):
        time.sleep(float(os.environ.get("SLOW", "0")))
        return super().training_step([batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]], index)


class Shuffled(Numbers):
    """The same in another order in each epoch."""

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.loader().dataset, 4, shuffle=True)


def arguments(folder, strategy, *more):
    words = ["fit", "--model", "test_killed_ranks.SlowNet", "--data", "test_killed_ranks.Shuffled"]
    words += ["--seed_everything", "3", "--optimizer", "AdamW", "--optimizer.lr", "0.01"]
    words += ["--peft.method", "LoRA", "--peft.method.rank", "2", "--peft.method.targets", "['net.0', 'net.2']"]
    words += ["--peft.show_summary", "false", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    words += ["--trainer.strategy", strategy, "--trainer.max_epochs", str(EPOCHS), "--trainer.logger", "false"]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(folder)]
    words += ["--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.dirpath", str(folder)]
    words += ["--trainer.callbacks.filename", "{epoch}", "--trainer.callbacks.save_top_k", "-1"]
    return [*words, "--trainer.use_distributed_sampler", "true", *more]


def environment(**more):
    here = Path(__file__).parent
    paths = os.pathsep.join(str(folder) for folder in (here, here.parents[1], here.parents[2]))
    own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_", "PL_"))}
    return own | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def start(folder, strategy, **slow):
    with (folder / "log").open("w") as log:
        settings = {"env": environment(**slow), "stdout": log, "stderr": log, "start_new_session": True}
        command = [sys.executable, "-m", "lightning_peft", *arguments(folder, strategy)]
        return subprocess.Popen(command, **settings)


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def final(folder):
    state = torch.load(folder / f"epoch={EPOCHS - 1}.ckpt", weights_only=True)
    return state["state_dict"] | {
        f"average {k}": v["exp_avg"] for k, v in state["optimizer_states"][0]["state"].items()
    }


def killed(folder, strategy, victim):
    """Start a run and kill one of its processes once there are checkpoints; all must end, with an error."""
    folder.mkdir()
    run, other = start(folder, strategy, SLOW="0.02"), None
    try:
        while not (folder / "epoch=5.ckpt").exists():
            assert run.poll() is None, (folder / "log").read_text()
            time.sleep(0.01)
        other = next(pid for pid in children(run) if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes())
        os.kill(other if victim == "second" else run.pid, signal.SIGKILL)
        began = time.monotonic()
        assert run.wait(60) != 0
        while Path(f"/proc/{other}/cmdline").exists() and Path(f"/proc/{other}/cmdline").read_bytes():
            assert time.monotonic() - began < 60
            time.sleep(0.05)
        print(f"{strategy}, {victim} process killed: all ended after {time.monotonic() - began:.1f} s")
    finally:
        if run.poll() is None or other is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    assert not (folder / f"epoch={EPOCHS - 1}.ckpt").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
@pytest.mark.parametrize("strategy", ["ddp", "lightning_peft.FSDP2Strategy"])
def test_a_killed_process_ends_the_run_and_costs_nothing_before_its_checkpoint(tmp_path, strategy):
    victims = ["first", "second"]
    with ThreadPoolExecutor() as pool:  # the command waits most of the time until its processes are there
        list(pool.map(lambda victim: killed(tmp_path / victim, strategy, victim), victims))
    together(main, arguments(tmp_path / "undisturbed", strategy))
    expected = final(tmp_path / "undisturbed")
    for folder in (tmp_path / victim for victim in victims):
        together(main, arguments(folder, strategy, "--ckpt_path", str(folder / "epoch=4.ckpt")))
        found = final(folder)
        assert found.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
