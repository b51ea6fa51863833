"""What saving takes: a model of a billion parameters is sharded, and only its adapters are brought together."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from billion import Billion, memory
from parallel_laws import whole
from processes import together
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from trainer_models import trainer

import lightning_peft as lp


def zeros_of(module, path):
    """Write a safetensors file of zeros that takes no room on the disk."""
    entries, end = {}, 0
    for name, p in module.net.named_parameters():
        entries[name] = {"dtype": "BF16", "shape": list(p.shape), "data_offsets": [end, end + 2 * p.numel()]}
        end += 2 * p.numel()
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def saving(folder):
    dist.init_process_group("gloo")
    folder, found = Path(folder), {}
    module = Billion()
    path = folder / "base.safetensors"
    if dist.get_rank() == 0:
        zeros_of(module, path)
    dist.barrier()
    empty = memory("VmRSS")
    for kind, sharded in (("file", False), ("folder", True)):
        peft = lp.PEFTStrategy(lp.LoRA(rank=8), show_summary=False, check_base=False)
        strategy = lp.FSDP2Strategy(base_weights=str(path), save_distributed_checkpoint=sharded)
        runs = trainer(peft, strategy=strategy, devices=2, max_steps=0)
        runs.fit(module, DataLoader(torch.zeros(2)))
        shard = sum(p.to_local().nbytes for p in module.parameters() if isinstance(p, DTensor))
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        runs.save_checkpoint(folder / kind)
        found[kind] = (memory("VmHWM") - empty) / shard
    Path("/proc/self/clear_refs").write_text("5")
    lp.save_adapter(module, folder / "adapter")
    found["adapter"] = (memory("VmHWM") - empty) / shard
    frozen = [p for p in module.parameters() if not p.requires_grad]
    return sum(p.numel() for p in frozen), shard, found, whole(frozen[0]).sum().item()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read in /proc")
def test_saving_from_a_sharded_model_of_a_billion_takes_no_more_than_the_shard(tmp_path):
    for numbers, shard, found, total in together(saving, str(tmp_path), seconds=400):
        print(f"{numbers:,} parameters, {shard / 1e9:.3f} GB on this rank; peak of saving, in shards: {found}")
        assert numbers > 1.1e9
        assert math.isclose(shard, numbers, rel_tol=0.01)  # two bytes of one half
        assert max(found.values()) < 1.1
        assert total == 0
    folder, adapter = (sum(f.stat().st_size for f in (tmp_path / kind).iterdir()) for kind in ("folder", "adapter"))
    assert 4.5e6 < adapter < 4.6e6
    assert 4.5e6 < (tmp_path / "file").stat().st_size < 4.7e6  # no step was made: the optimizer has no averages
    assert 13.5e6 < folder < 14.5e6  # with averages, at zero
