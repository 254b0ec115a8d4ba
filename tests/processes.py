"Several processes, forked from this one: they need not import anything again."

import multiprocessing
import os
import socket

import pytest
import torch
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    "One process on the CPU, wherever the tests of a file that imports this run."
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_processes(count, work, *args):
    """Run `work(*args)` in forked processes that accelerate takes for those of a launcher.

    Gives them, started, to the caller, who may kill one; `ends` waits for them.
    """
    port, processes = str(free_port()), []
    for rank in range(count):
        def child(rank=rank):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            AcceleratorState._reset_state(reset_partial_state=True)
            torch.set_num_threads(1)
            work(*args)
        processes.append(multiprocessing.get_context("fork").Process(target=child))
        processes[-1].start()
    return processes


def ends(processes, timeout=240):
    "Exit codes, in order."
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes
