"""What a call must give, in float64, and how far each number may be from it.

A number may be off by twice the error of an eager float32 computation of the same numbers, plus what rounding costs a
kernel. That budget is derived for every element: each rounding is carried through the formulas to first order, with
absolute values in place of signs, and doubled for the second order. With ``u`` the dtype's unit roundoff and ``w`` that
of float32:

- a logit is a sum of D products: ``sqrt(D) w`` of the sum of their absolute values, for random signs of the roundings;
- a weight is off by ``e`` (twice its row's worst logit), ``sqrt(S) w`` of the sum of the others, some ``w`` of the
  exponential, and ``u`` where it is rounded for the second product; float16 has no numbers below 2**-24;
- a backward takes the rounded output for its row sums, and rounds weights and gradients of the logits to the dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tests.kernels.oracle import UNIT_ROUNDOFF, dense_attention, permute, unpermute

from .fuzz_calls import Call

W = UNIT_ROUNDOFF[torch.float32]
# What is lost of a number near 0: half of float16's smallest; and of float32, in which weights are kept, whatever is
# below the smallest normal one, which processors may take for 0.
SMALLEST = {torch.float16: 2.0**-25, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}


@dataclass
class Expected:
    """Exact results and the largest errors allowed: ``out, dq, dk, dv [B, S, H, D]`` and ``lse [B, H, S]``."""

    exact: dict[str, torch.Tensor]
    allowed: dict[str, torch.Tensor]


def expected(call: Call, backend: str) -> Expected:
    """See the module. The ``torch`` backend rounds more: gradients of the probabilities, and every query block's share
    of a key's gradient."""
    exact, budget = _exact(call, backend)
    allowed = {}
    for name, eager in _eager(call).items():
        error = (eager.double() - exact[name]).abs()
        if name == "lse":
            error = error.nan_to_num(0.0).amax(2, keepdim=True)  # -inf less -inf
        else:
            error = error.amax((1, 3), keepdim=True)
        allowed[name] = 2 * error + 2 * budget[name]
    return Expected(exact, allowed)


def _eager(call: Call) -> dict[str, torch.Tensor]:
    inputs = [x.detach().float().requires_grad_(call.grad is not None) for x in (call.q, call.k, call.v)]
    out, lse = dense_attention(*inputs, call.visible, call.rows, call.scale, torch.float32)
    found = {"out": out.detach(), "lse": lse.detach()}
    if call.grad is not None:
        grad_lse = of_seen(call.grad_lse, lse)
        loss = (out * call.grad.float()).sum() + (lse.masked_fill(~lse.isfinite(), 0.0) * grad_lse).sum()
        found.update(zip(("dq", "dk", "dv"), torch.autograd.grad(loss, inputs)))
    return found


def of_seen(grad_lse: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Gradients of the log-sum-exp, 0 for queries that see nothing."""
    return grad_lse.masked_fill(~lse.detach().isfinite(), 0.0)


def _exact(call: Call, backend: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Exact results and budgets, both in the model's order."""
    u, least = UNIT_ROUNDOFF[call.q.dtype], SMALLEST[call.q.dtype]
    rows, dim, length = call.rows, call.q.shape[-1], call.q.shape[1]
    scale = dim**-0.5 if call.scale is None else call.scale
    q, k, v = (permute(x.transpose(1, 2).double(), rows) for x in (call.q, call.k, call.v))
    seen = call.visible.expand(*q.shape[:2], length, length)
    scores = (q @ k.mT * scale).masked_fill_(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    some = lse.isfinite()
    weights = scores.sub_(lse.masked_fill(~some, 0.0)[..., None]).exp_()
    out = weights @ v

    # The bounds themselves need no float64.
    size = (q.float().abs() @ k.float().abs().mT * scale).masked_fill_(~seen, 0.0).amax(-1).double()
    logit = (math.sqrt(dim) + 4) * W * size
    weight = 2 * logit + (2 * math.sqrt(length) + 8) * W
    near = weights.float()
    shares = seen.float() * least
    away = (near @ v.float().abs()).double()
    budget_out = (u + weight[..., None]) * away + u * out.abs() + least
    budget_out += (shares @ v.float().abs()).double()
    budget_lse = logit + (2 * math.sqrt(length) + 8) * W + 4 * W * lse.masked_fill(~some, 0.0).abs()
    exact, budget = {"out": out, "lse": lse}, {"out": budget_out, "lse": budget_lse}
    if call.grad is not None:
        _add_gradients(call, backend, (q, k, v), seen, weights, exact, budget, 2 * weight[..., None], scale)
    for found in (exact, budget):
        for name, value in found.items():
            value = unpermute(value if name != "lse" else value[..., None], rows)
            found[name] = value.squeeze(-1) if name == "lse" else value.transpose(1, 2)
    return exact, budget


def _add_gradients(
    call: Call,
    backend: str,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    seen: torch.Tensor,
    weights: torch.Tensor,
    exact: dict[str, torch.Tensor],
    budget: dict[str, torch.Tensor],
    recomputed: torch.Tensor,
    scale: float,
) -> None:
    """dq, dk and dv; ``recomputed [B, H, S, 1]`` is how far a weight of the backward is off, of itself."""
    q, k, v = inputs
    u, least, dim = UNIT_ROUNDOFF[call.q.dtype], SMALLEST[call.q.dtype], q.shape[-1]
    grad = permute(call.grad.transpose(1, 2).double(), call.rows)
    grad_lse = permute(call.grad_lse[..., None].double(), call.rows)
    grad_lse = grad_lse.masked_fill(~exact["lse"].isfinite()[..., None], 0.0)
    told = grad @ v.mT
    delta = (exact["out"] * grad).sum(-1, keepdim=True)
    grad_scores = weights * (told - delta + grad_lse)
    exact["dv"] = weights.mT @ grad
    exact["dk"] = grad_scores.mT @ q * scale
    exact["dq"] = grad_scores @ k * scale

    near, told = weights.float(), told.float().abs()
    sums = (2 * math.sqrt(dim) + 4) * W
    # Errors of weights reach the row sums through each weight's own product, those of stored outputs one by one.
    off_delta = ((u + recomputed) * (weights * told.double()).sum(-1, keepdim=True)).float()
    stored = exact["out"] * grad
    off_delta += (2 * u * stored.norm(dim=-1, keepdim=True) + sums * stored.abs().sum(-1, keepdim=True)).float()
    off_delta += (W * grad_lse.abs() + least * grad.abs().sum(-1, keepdim=True)).float()
    off_told = sums * (grad.float().abs() @ v.float().abs().mT)
    rounded = 1.0
    if backend == "torch":
        off_told += u * (told + delta.float().abs())
        rounded += call.mask.num_blocks[0]
    tiny = seen.float() * least
    off_weights = near * (u + recomputed.float()) + tiny
    off_scores = grad_scores.float().abs() * (u + recomputed.float()) + near * (off_delta + off_told) + tiny
    for name, off, other in (
        ("dv", off_weights.mT, grad),
        ("dk", off_scores.mT * scale, q),
        ("dq", off_scores * scale, k),
    ):
        # Every share of a sum that is rounded when it is added is at most the sum of all, without signs.
        whole = exact[name].abs()
        if rounded > 1.0 and name != "dq":
            side = near.mT if name == "dv" else grad_scores.float().abs().mT * scale
            whole = (side @ other.float().abs()).double()
        budget[name] = (off @ other.float().abs()).double() + rounded * u * whole + least
