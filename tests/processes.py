"""Runs a function in several processes that talk over gloo, started as torchrun starts them: Lightning adds none."""

import gc
import multiprocessing
import os
import threading
import time
import traceback

import torch
import torch.multiprocessing as mp

# A server forks the processes after it has imported, once, what they would import.
START = mp.get_context("forkserver")
START.set_forkserver_preload(["transformers", "lightning.pytorch", "lightning_peft", "parallel_laws"])


def together(function, *args, count=2, seconds=300):
    """Return what ``function(*args)`` returned in each process, by rank; both must be known to a module by name.

    Raises:
        AssertionError: A process failed, with its traceback, or they did not end in time.
    """
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # holds its port
    port = store.port
    results = START.Queue()
    processes = [START.Process(target=_run, args=(r, count, port, results, function, args)) for r in range(count)]
    for process in processes:
        process.start()
    try:
        return _collect(results, processes, time.monotonic() + seconds)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(results, processes, end):
    found = {}
    while len(found) < len(processes):
        assert time.monotonic() < end, f"only ranks {sorted(found)} came to an end in time"
        if not results.empty():
            rank, value, error = results.get()
            assert error is None, f"rank {rank}: {error}"
            found[rank] = value
        elif all(not process.is_alive() for process in processes) and results.empty():
            raise AssertionError(f"processes ended with {[process.exitcode for process in processes]}")
        else:
            time.sleep(0.02)
    return [found[rank] for rank in range(len(processes))]


def _end_with(parent):
    parent.join()
    os._exit(1)


def _run(rank, count, port, results, function, args):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    os.environ |= {"MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    os.environ.pop("PL_GLOBAL_SEED", None)  # of a test that ran before; Lightning would draw everything anew from it
    torch.set_num_threads(1)
    gc.freeze()  # what the server imported stays: to look for garbage in it only takes time
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    try:
        results.put((rank, function(*args), None))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
