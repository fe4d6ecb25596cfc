"""Training on several processes: `torchrun --nproc-per-node N train.py ..`, one per core or GPU.

Every process reads the same examples, computes the gradient of its part of each batch, and gets the
sum of all parts. So all processes take the same optimiser steps and hold the same weights. Process 0
alone writes, prints and validates. Without torchrun these functions do nothing.

With --max-restarts N, torchrun starts all processes again when one dies, and they go on from the last
saved state (on one machine; on several, repeat the command). The number of processes may change from
one run to the next in the same folder. Sums are then taken in another order, so weights agree within
rounding; the same bytes are promised for one number of processes only.
"""

import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import Tensor

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def start() -> None:
    """Join the other processes; all but process 0 stop printing."""
    if WORLD == 1 or torch.distributed.is_initialized():
        return
    # The optimiser imports this. If that happens while there is a process group, the group is kept for
    # ever, and gloo's threads run on into the end of the interpreter, where they sometimes abort it.
    from torch import _dynamo  # noqa: F401

    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the life of the process)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    store, *_ = next(torch.distributed.rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(WORLD):
        # After a restart the store still holds the addresses of the processes that died.
        life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = torch.distributed.PrefixStore(f"life {life}", store)
    # torchrun notices a process that died. A long wait for process 0 (a teacher's replies, validation)
    # is no failure.
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    about = dict(store=store, rank=RANK, world_size=WORLD, timeout=timedelta(days=7))
    torch.distributed.init_process_group(backend, **about)


def end() -> None:
    if WORLD > 1:
        torch.distributed.destroy_process_group()


def largest(number: int) -> int:
    """The largest of all processes' numbers. All processes wait for each other here."""
    if WORLD == 1:
        return number
    shared = torch.tensor(number)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return int(shared)


def process_0_first(f: Callable):
    """Call f() on process 0, then on the others, which find the disk as process 0 left it."""
    for mine in (RANK == 0, RANK > 0):
        if mine:
            result = f()
        largest(0)
    return result


def sum_up(total: Tensor, parameters: list[Tensor]) -> None:
    """Sum `total` and all gradients over the processes. One without examples adds zeros."""
    if WORLD == 1:
        return
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    for tensor in (total, *(p.grad for p in parameters)):
        torch.distributed.all_reduce(tensor)
