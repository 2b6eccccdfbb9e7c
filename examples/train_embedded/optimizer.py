"""Muon for hidden matrices and convolution kernels: momentum, orthogonalised by Newton-Schulz iterations.

Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the step is scaled to the
size of an AdamW step as in Liu et al., "Muon is scalable for LLM training" (2025). Matrices of one shape
are updated together.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Moves the singular values of a stack [n, rows, columns] near one."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay.

    Takes matrices, and kernels of any rank as the matrix [out, rest].
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.02,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, _closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                for parameter in parameters:
                    if "momentum" not in self.state[parameter]:
                        self.state[parameter]["momentum"] = torch.zeros_like(parameter)
                buffers = [self.state[p]["momentum"] for p in parameters]
                grads = [p.grad for p in parameters]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                ahead = torch._foreach_lerp(grads, buffers, group["momentum"])
                update = orthogonalize(torch.stack([a.flatten(1) for a in ahead]))
                scale = 0.2 * max(update.shape[1:]) ** 0.5 * group["lr"]
                update = update.view(-1, *shape)
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(update.unbind()), alpha=-scale)
