"""Distillation to few steps by consistency along the teacher's trajectory."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from .few_steps import Trajectory
from .noisy import NoisyBatch, guided, mean_square, velocity


def consistency_loss(
    model: Any, teacher: AbstractContextManager[None], batch: NoisyBatch, trajectory: Trajectory, guidance: float
) -> torch.Tensor:
    """Phased consistency distillation (arXiv 2405.18407) of flow matching, a 0-d tensor.

    From a level ``t`` of the teacher's run, with the next one ``u`` and the end ``s`` of the segment that ``t`` is in,
    the model is to reach at ``s`` what it reaches from where one step of the teacher leads to: with ``f(x, t, s) =
    x + (s - t) v(x, t)`` that is ``f(x_t, t, s) = f(x_t + (u - t) v_teacher, u, s)``, the right side held fixed. Both
    sides less ``x_t``, over ``s - t``, are velocities; the loss is their squared difference. One step of Euler a
    segment is then the whole run.

    Args:
        model: the patched transformer, possibly wrapped for several devices.
        teacher: context in which it is the dense teacher.
        batch: at levels that ``trajectory`` has.
        guidance: scale of the teacher's.
    """
    later, end = batch.level.clone(), batch.level.clone()
    for n, level in enumerate(batch.level.tolist()):
        later[n], end[n] = trajectory.after(level)
    with torch.no_grad():
        with teacher:
            taught = guided(model, batch, guidance)
        level, middle, last = (value.view(-1, *[1] * (taught.dim() - 1)) for value in (batch.level, later, end))
        there = batch.latents + ((middle - level) * taught).to(batch.latents.dtype)
        # At the end of a segment nothing is left to go, whatever the model says.
        wanted = ((middle - level) * taught + (last - middle) * velocity(model, batch.at(there, later))) / (
            last - level
        )
    return mean_square(velocity(model, batch), wanted, batch.noised)
