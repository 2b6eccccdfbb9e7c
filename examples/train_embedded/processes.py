"""Several processes, one GPU each, under `torchrun`: everything here does nothing in a single process."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist


def start_processes() -> torch.device:
    """Joins the others, if there are any; returns this process's device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "LOCAL_RANK" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def is_first() -> bool:
    """Whether this process prints and saves."""
    return not dist.is_initialized() or dist.get_rank() == 0


def process_seed(seed: int) -> int:
    """Another seed for every process, so that each draws clips and noise of its own."""
    return seed + (1000 * dist.get_rank() if dist.is_initialized() else 0)


def average_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Means over the processes; a parameter that one of them did not touch counts as zero there."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in grads])
    if flat.is_cuda:
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
    else:
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
    for p, grad, part in zip(parameters, grads, flat.split([p.numel() for p in parameters])):
        p.grad = grad.copy_(part.view_as(p))


def together(seconds: float, device: torch.device) -> float:
    """The first process's clock, so that all of them stop at the same step."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return seconds
    shared = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    return shared.item()


def end_processes() -> None:
    """Leaves the others."""
    if dist.is_initialized():
        dist.destroy_process_group()
