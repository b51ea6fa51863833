"""What a run of benchmarks/evidence.py costs: seconds of the processor, memory, bytes of files."""

import gc
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning_peft as lp


class Cost:
    """Seconds of the processor within a block, and the peak of the process's memory above that before it, in bytes."""

    seconds = 0.0
    memory = 0

    def __enter__(self) -> "Cost":
        gc.collect()
        self._resident, self._start = status("VmRSS"), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = round(time.process_time() - self._start, 2)
        self.memory = max(0, status("VmHWM") - self._resident)


def status(name: str) -> int:
    """Return an entry of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def file_sizes(module: Any, trainer: Any) -> dict[str, int]:
    """Return the bytes of a trained module's adapter file, and of a checkpoint with the optimizer's state."""
    with tempfile.TemporaryDirectory() as folder:
        adapter = lp.save_adapter(module, Path(folder) / "adapter") / "adapter_model.safetensors"
        trainer.save_checkpoint(Path(folder) / "run.ckpt")
        return {
            "adapter_bytes": adapter.stat().st_size,
            "checkpoint_bytes": (Path(folder) / "run.ckpt").stat().st_size,
        }
