"""What ``holdfast doctor`` asks of torch: ``python -m holdfast.training.distributed.probing``.

Prints one JSON object: the GPUs, and how long two processes of this machine take to meet and to
sum, over the same store and the same gloo, and NCCL, as a training's.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from datetime import timedelta
from itertools import combinations
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from holdfast.training.distributed.world import HOST, World

NUM_RANKS = 2
SUM_BYTES = 2**24
NUM_SUMS = 5
TIMEOUT = timedelta(seconds=30)


def main() -> None:
    """Print what was found."""
    found: dict[str, Any] = {"sum_bytes": SUM_BYTES}
    gpus = range(torch.cuda.device_count())
    devices = ("cpu", "cuda") if len(gpus) >= NUM_RANKS else ("cpu",)
    for device in devices:
        try:
            found[f"{device}_sum_s"] = measured_sum_s(device)
        except RuntimeError as error:
            found[f"{device}_problem"] = " ".join(str(error).split())[:300]
    found["gpus"] = [torch.cuda.get_device_name(k) for k in gpus]
    found["apart"] = [
        [k, other]
        for k, other in combinations(gpus, 2)
        if not torch.cuda.can_device_access_peer(k, other)
    ]
    print(json.dumps(found))


def measured_sum_s(device: str = "cpu") -> float:
    """Seconds of a sum of ``SUM_BYTES`` over two processes. Raises RuntimeError, which says why.

    With ``cuda`` each process has a GPU.
    """
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    reading, writing = os.pipe()
    pids = []
    for rank in range(NUM_RANKS):
        pid = os.fork()  # no other thread of this process holds anything
        if pid == 0:
            _be_rank(rank, store.port, writing, device)
        pids.append(pid)
    os.close(writing)
    with os.fdopen(reading) as answers:
        told = answers.read().splitlines()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    if any(codes) or len(told) != NUM_RANKS:
        raise RuntimeError(next((line for line in told if "Error" in line), f"ended with {codes}"))
    return max(float(line) for line in told)


def _be_rank(rank: int, port: int, writing: int, device: str) -> None:
    """Meet, sum, write how long it took, and end."""
    try:
        torch.set_num_threads(1)
        store = TCPStore(HOST, port, is_master=False, timeout=TIMEOUT)
        backend = "gloo" if device == "cpu" else "nccl"
        if device != "cpu":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=NUM_RANKS, timeout=TIMEOUT
        )
        world, values = World(rank, NUM_RANKS, store), torch.ones(SUM_BYTES // 4, device=device)
        seconds = []
        for _ in range(NUM_SUMS):
            start_s = time.perf_counter()
            world.sum_of(values).sum().item()  # the GPU is waited for
            seconds.append(time.perf_counter() - start_s)
        os.write(writing, f"{median(seconds)}\n".encode())
        os._exit(0)
    except BaseException as error:  # noqa: BLE001  # a process of its own
        traceback.print_exc()
        os.write(
            writing, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}\n".encode()
        )
        os._exit(1)


if __name__ == "__main__":
    main()
