"""Several processes that train one model together, each on its share of every batch: `ldm train unet --processes 2`.

Every process holds the whole model and draws the same random numbers, but computes the loss of its own rows only. The
mean of their gradients is the gradient of the whole batch, so all of them take the same step and stay equal. On a CPU
two processes of one thread each do more than one process of two threads, which wait for each other in every layer; of
several GPUs each takes one. A process that is alone does all of this with itself.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ldm.errors import STOPPED, LDMError


def spawn(processes: int, command: list[str]) -> None:
    """Run `ldm` with these arguments in several processes, and wait for all. If one fails, the others are ended.

    They find each other as torchrun's do, through RANK, WORLD_SIZE and a port of this machine.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared["OMP_NUM_THREADS"] = max(1, (os.cpu_count() or 1) // processes)
    children = []
    for number in range(processes):
        own = {"RANK": number, "LOCAL_RANK": number} | shared
        environment = os.environ | {name: str(value) for name, value in own.items()}
        program = [sys.executable, "-m", "ldm", *command]
        children.append(subprocess.Popen(program, env=environment, start_new_session=True))  # hears from us alone

    def pass_on(signum, frame):
        for child in children:
            child.send_signal(signal.SIGINT)  # the step in hand is finished and saved; a second one stops at once

    old = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while any(child.poll() is None for child in children):
            time.sleep(0.1)
            if any(child.poll() not in (None, 0, STOPPED) for child in children):
                break
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        for child in children:
            child.terminate()  # those that still run, because another one failed
    codes = {child.wait() for child in children}
    if STOPPED in codes and codes <= {0, STOPPED}:
        raise KeyboardInterrupt
    if codes != {0}:
        raise LDMError(f"One of the {processes} processes failed, and what it said is above.")


def start(device: str) -> str:
    """Meet the other processes, if `spawn` started several; returns the device that is this one's own."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    own = f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    if own.startswith("cuda"):
        torch.cuda.set_device(own)
    if not dist.is_initialized():  # a day: the others wait while the first one draws and encodes the pictures
        backend = "cpu:gloo,cuda:nccl" if own.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
    return own


def leave() -> None:
    """Part from the other processes, when all is done or saved: their connections' threads abort a process that ends
    while they run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def leads() -> bool:
    """Whether this process is the one that writes and reports."""
    return rank() == 0


@contextmanager
def leader_first() -> Iterator[None]:
    """The first process goes ahead; the others wait and find what it has made."""
    if not leads():
        dist.barrier()
    yield
    if leads() and world() > 1:
        dist.barrier()


def share(batch: int) -> slice:
    """The rows of a batch that are this process's own."""
    if batch % world():
        raise LDMError(f"A batch of {batch} cannot be shared by {world()} processes: choose a multiple of {world()}.")
    return slice(rank(), None, world())


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its mean over the processes."""
    if world() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    together = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(together)
    for g, mean in zip(gradients, (together / world()).split([g.numel() for g in gradients]), strict=True):
        g.copy_(mean.view_as(g))


def any_of_us(flag: bool) -> bool:
    """Whether `flag` is set in any process."""
    if world() == 1:
        return flag
    found = torch.tensor(float(flag))
    dist.all_reduce(found)
    return found.item() > 0
