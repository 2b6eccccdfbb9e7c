"""Processes that share sequences while they train: which have the same samples, and what gradients add up to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from .objective import Objective


@dataclass(frozen=True)
class SequenceShares:
    """A training's processes, in groups that share a sequence by diffusers' context parallelism.

    Each has gradients of its own tokens, whose sum is the gradient of a sequence. DDP and FSDP average over all
    processes, so that the loss is multiplied by :attr:`degree` first.

    Attributes:
        degree: processes of a group; 1 where each has a sequence of its own.
        group, groups: number of this process' group, and how many there are: each has samples of its own.
    """

    degree: int = 1
    group: int = 0
    groups: int = 1

    @classmethod
    def of(cls, model: Any, objective: Objective, process: int, processes: int) -> SequenceShares:
        """Those of a transformer, as ``enable_parallelism`` left it. All processes must call it.

        Raises:
            ValueError: the processes are no whole number of groups, weights are shared out by heads, or the objective
                is of what a process does not have whole.
        """
        config = getattr(model, "_parallel_config", None)
        if config is None:
            return cls(1, process, processes)
        context = config.context_parallel_config
        if context is None:
            raise ValueError("Tensor parallelism is for generating; train with FSDP 2, or with context parallelism.")
        named = [name for name in ("outputs", "align", "gate", "dmd") if getattr(objective, name)]
        if named:
            raise ValueError(
                f"objective.{named[0]} needs whole attention layers or a critic's own gradients, which context "
                "parallelism shares out: take flow, distill or consistency."
            )
        members = dist.get_process_group_ranks(context._flattened_mesh.get_group())
        degree = len(members)
        if processes % degree:
            raise ValueError(
                f"{processes} processes are no whole number of groups of {degree}, which share a sequence."
            )
        firsts: list[int] = [0] * processes
        dist.all_gather_object(firsts, min(members))
        order = sorted(set(firsts))
        return cls(degree, order.index(min(members)), len(order))


def refuse_shares(processes: int, degree: int) -> None:
    """Check whether so many processes can share sequences by ``degree``.

    Raises:
        ValueError: they cannot.
    """
    if degree < 1 or processes % degree:
        raise ValueError(
            f"context_parallel {degree} shares a sequence among as many processes, and {processes} were started: start "
            "a multiple of it with torchrun or accelerate launch."
        )
    if degree > 1 and not torch.accelerator.device_count():
        raise ValueError(
            f"context_parallel {degree} is diffusers' context parallelism, which needs a GPU for each process; this "
            "machine has none."
        )


def share_sequences(model: Any, degree: int, plan: Any = None) -> None:
    """Let each ``degree`` processes that follow each other share a sequence, by heads (Ulysses).

    Args:
        plan: how diffusers splits the model's tokens; None for its own plan.

    Raises:
        ValueError: they cannot; see :func:`refuse_shares`.
    """
    processes = dist.get_world_size() if dist.is_initialized() else 1
    refuse_shares(processes, degree)
    from diffusers import ContextParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    shape = (processes // degree, 1, degree)
    mesh = init_device_mesh(model.device.type, shape, mesh_dim_names=("samples", "ring", "ulysses"))
    # Whatever the sizes of samples are, and the number of heads.
    config = ContextParallelConfig(ulysses_degree=degree, ulysses_anything=True, mesh=mesh)
    model.enable_parallelism(config=config, cp_plan=plan)
