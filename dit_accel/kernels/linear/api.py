"""Linear attention over the blocks that the sparse branch leaves out: the other half of SLA (2509.24006).

For query block i with marginal key blocks M_i, ``out = phi(q) H_i / (phi(q) . Z_i)`` with
``H_i = sum over j in M_i of phi(K_j)^T V_j`` and ``Z_i`` likewise of ``phi(K_j)``. Three forms:

* the paper's: marginal = neither critical nor negligible;
* the released branch SLA-1: marginal = not critical (leave ``negligible`` out);
* the released main branch and TurboDiffusion: all tokens (``critical=None``), with ``eps=1e-5``.

How the sums are made: H_i is a row of the product of the 0/1 map of marginal blocks with the block states,
one matrix product of ``2 * nq * nk * D * D`` operations a head: D / (2 * block_q * block_k) of the dense
attention's, under 1% for 128x64 blocks. Subtracting the critical blocks' states from the total would read
about density * nk states of D x D per query block instead (2.6 GB at 32,768 tokens, 12 heads, density 0.05,
against 0.6 GB here), and a second linear accumulator inside the sparse kernel would double that kernel's
operations. The product also has no cancellation and takes the negligible class for free.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from ..common.capability import why_not_tiles
from ..common.choice import Case, Choice, case_of, choose
from ..common.tokens import gather_mask, gather_rows
from ..mask.block_mask import BlockMask
from .projection import project_heads
from .shared import SharedSums, sum_states

FeatureMap = Literal["softmax", "elu", "relu", "hedgehog"]
FEATURE_MAPS = ("softmax", "elu", "relu", "hedgehog")


def apply_feature_map(x: torch.Tensor, feature_map: FeatureMap) -> torch.Tensor:
    """phi(x) over the last dimension; float32 inside, float64 kept.

    ``"softmax"``; ``"elu"``, plus one; ``"relu"``; ``"hedgehog"``, the softmax of x and that of -x side by
    side, twice the features (arXiv 2402.04347; x comes from its learned map).
    """
    x = x if x.dtype == torch.float64 else x.float()
    if feature_map == "softmax":
        return x.softmax(-1)
    if feature_map == "elu":
        return F.elu(x) + 1
    if feature_map == "relu":
        return x.relu()
    if feature_map == "hedgehog":
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
    raise ValueError(f"feature_map must be one of {FEATURE_MAPS}, got {feature_map!r}.")


def linear_states(
    k: torch.Tensor,
    v: torch.Tensor,
    block: int,
    feature_map: FeatureMap = "softmax",
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block states ``phi(K_j)^T V_j`` and ``sum phi(K_j)``, differentiable, on any device.

    Args:
        k, v: ``[B, S, H, D]``, any strides.
        block: tokens in a block.
        rows, key_mask: see :func:`dit_accel.kernels.selection.api.pool_blocks`; hidden tokens add nothing.

    Returns:
        ``(h, z)``: ``[B, H, n, D, D]`` and ``[B, H, n, D]``, float32 (float64 for float64 input).
    """
    k, v = gather_rows(k, rows), gather_rows(v, rows)
    if key_mask is not None:
        visible = gather_mask(key_mask, rows)[..., None]
        k, v = k.masked_fill(~visible, 0), v.masked_fill(~visible, 0)
    phi = apply_feature_map(k, feature_map)
    if key_mask is not None:
        phi = phi.masked_fill(~visible, 0)
    pad = -k.shape[2] % block
    phi = F.pad(phi, (0, 0, 0, pad)).unflatten(2, (-1, block))
    v = F.pad(v.to(phi.dtype), (0, 0, 0, pad)).unflatten(2, (-1, block))
    return phi.transpose(-1, -2) @ v, phi.sum(-2)


def marginal_map(
    critical: BlockMask, negligible: BlockMask | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """1 where a block pair is neither critical nor negligible, else 0: ``[B|1, H|1, nq, nk]``."""
    out = critical.to_dense()
    if negligible is not None:
        out = out | negligible.to_dense()
    return (~out).to(dtype)


def linear_branch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    critical: BlockMask | None,
    *,
    negligible: BlockMask | None = None,
    feature_map: FeatureMap = "softmax",
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    eps: float = 0.0,
    backend: str = "auto",
    shared: SharedSums | None = None,
) -> torch.Tensor:
    """The linear branch's output, differentiable in q, k and v.

    Args:
        q, k, v: ``[B, Sq, H, D]``, ``[B, Sk, H, D]`` twice, any strides.
        critical: blocks that the sparse branch reads and this one leaves out; None takes all tokens.
        negligible: blocks that neither branch reads (``select_blocks(-scores, density=0.1,
            keep_own=False)`` lists the lowest tenth); where both list a block it is critical.
        feature_map: see :func:`apply_feature_map`; ``"hedgehog"`` has no Triton kernel, ``"auto"`` then means
            torch.
        rows, key_mask: see :func:`dit_accel.kernels.selection.api.pooled_scores`. Output rows are in
            original order.
        eps: added to the denominator.
        backend: one of :data:`~dit_accel.kernels.BACKENDS`; ``"auto"`` is Triton on CUDA.
        shared: several processes share the sequence, and q, k, v and ``key_mask`` are of the slots of this one; there
            are no ``rows``, and the masks are of all query blocks and this process' key blocks. All must call it.

    Returns:
        ``[B, Sq, H, D]`` in q's dtype; 0 for a query whose denominator is 0 (no marginal block).
    """
    check_linear(q, k, v, critical, negligible, feature_map, rows, shared)
    if _in_triton(q, critical, feature_map, backend):
        from .triton.backward import LinearBranchFunction

        options = (critical, negligible, feature_map, rows, key_mask, eps, shared)
        return LinearBranchFunction.apply(q, k, v, None, None, None, *options)
    if critical is None:
        h, z = linear_states(k, v, k.shape[1], feature_map, rows=None, key_mask=key_mask)
        block_q = q.shape[1]
    else:
        h, z = linear_states(k, v, critical.block_k, feature_map, rows=rows, key_mask=key_mask)
        marginal = marginal_map(critical, negligible, h.dtype)
        h = torch.einsum("bhij,bhjde->bhide", marginal.expand(*h.shape[:2], -1, -1), h)
        z = marginal @ z
        block_q = critical.block_q
    if shared is not None:
        h, z = sum_states(h, z, shared)
    phi = apply_feature_map(gather_rows(q, rows), feature_map)
    pad = -phi.shape[2] % block_q
    phi = F.pad(phi, (0, 0, 0, pad)).unflatten(2, (-1, block_q))
    den = phi @ z[..., None] + eps
    out = torch.where(den > 0, (phi @ h) / torch.where(den > 0, den, 1.0), 0.0)
    out = out.flatten(2, 3)[:, :, : q.shape[1]]
    if rows is not None:
        out = torch.zeros_like(out).scatter(2, rows.long()[..., None].expand_as(out), out)
    return out.transpose(1, 2).to(q.dtype)


def add_linear_branch(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    critical: BlockMask | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    negligible: BlockMask | None = None,
    feature_map: FeatureMap = "softmax",
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    eps: float = 0.0,
    backend: str = "auto",
    shared: SharedSums | None = None,
) -> torch.Tensor:
    """``out += linear_branch(...) @ weight.T + bias`` in place, without gradients: SLA's inference epilogue.

    Args:
        out: ``[B, Sq, H, D]``, the sparse branch's output; changed in place and returned.
        weight: ``[D, D]`` (out, in), shared by the heads, or ``[H, D, D]``; any float dtype.
        bias: optional ``[D]`` or ``[H, D]``.

    The other arguments are those of :func:`linear_branch`. On Triton one kernel reads q and the states,
    projects and adds, so that the linear output itself never reaches memory.

    Raises:
        ValueError: shapes do not fit together, or the named backend cannot run the call.
    """
    check_linear(q, k, v, critical, negligible, feature_map, rows, shared)
    check_projection(out, q, weight, bias)
    with torch.no_grad():
        if _in_triton(q, critical, feature_map, backend):
            from .triton.forward import linear_forward

            return linear_forward(
                q, k, v, critical, negligible, feature_map, rows, key_mask, eps,
                added=out, weight=weight, bias=bias, out=out, shared=shared,
            )  # fmt: skip
        branch = linear_branch(
            q, k, v, critical, negligible=negligible, feature_map=feature_map, rows=rows,
            key_mask=key_mask, eps=eps, backend="torch", shared=shared,
        )  # fmt: skip
        return out.add_(project_heads(branch, weight, bias))


def plus_linear_branch(
    out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    critical: BlockMask | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    negligible: BlockMask | None = None,
    feature_map: FeatureMap = "softmax",
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    eps: float = 0.0,
    backend: str = "auto",
    shared: SharedSums | None = None,
) -> torch.Tensor:
    """``out + linear_branch(...) @ weight.T + bias`` as a new tensor, differentiable: SLA in training.

    Args: those of :func:`add_linear_branch`; ``out`` is not changed.

    Returns:
        ``[B, Sq, H, D]`` in out's dtype, differentiable in out, q, k, v, weight and bias. On Triton the backward
        keeps no activations but its inputs, and one state a head in the form over all tokens; it cannot be
        differentiated again. On torch it keeps what autograd keeps, the linear output among it.

    Raises:
        ValueError: shapes do not fit together, or the named backend cannot run the call.
    """
    check_linear(q, k, v, critical, negligible, feature_map, rows, shared)
    check_projection(out, q, weight, bias)
    if _in_triton(q, critical, feature_map, backend):
        from .triton.backward import LinearBranchFunction

        options = (critical, negligible, feature_map, rows, key_mask, eps, shared)
        return LinearBranchFunction.apply(q, k, v, out, weight, bias, *options)
    branch = linear_branch(
        q, k, v, critical, negligible=negligible, feature_map=feature_map, rows=rows,
        key_mask=key_mask, eps=eps, backend="torch", shared=shared,
    )  # fmt: skip
    return out + project_heads(branch, weight, bias).to(out.dtype)


def choose_linear(case: Case, feature_map: str, backend: str = "auto") -> Choice:
    """The backend of the linear branch; raises a ValueError if it is refused.

    Args:
        case: its blocks are those of the critical ones; None for the form over all tokens.
    """
    why_rather_torch = None
    if case.dtype == torch.float32 and case.head_dim is not None and case.head_dim > 64:
        why_rather_torch = "exact float32 tiles of this head dim spill registers and take minutes to compile"
    return choose("linear_branch", backend, case, why_not_linear(case, feature_map), why_rather_torch)


def why_not_linear(case: Case, feature_map: str) -> str | None:
    """Why the kernels cannot take a case; None if they can."""
    if feature_map == "hedgehog":
        return "the hedgehog feature map has no Triton kernel"
    if case.head_dim is not None and case.head_dim > 128:
        return f"head dim must be at most 128 for the linear branch's Triton kernels, got {case.head_dim}"
    return why_not_tiles(case)


def _in_triton(q: torch.Tensor, critical: BlockMask | None, feature_map: str, backend: str) -> bool:
    return choose_linear(case_of(q, mask=critical), feature_map, backend).name == "triton"


def check_linear(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    critical: BlockMask | None,
    negligible: BlockMask | None,
    feature_map: str,
    rows: torch.Tensor | None = None,
    shared: SharedSums | None = None,
) -> None:
    """Raise one clear error for arguments that do not fit together."""
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {FEATURE_MAPS}, got {feature_map!r}.")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(
            "q, k and v must agree in batch, heads and head dim, and k and v in length, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}."
        )
    if shared is not None and rows is not None:
        raise ValueError("Where processes share the sequence its tokens come in the order of their slots: no rows.")
    if critical is None:
        if negligible is not None:
            raise ValueError("negligible needs critical: the form over all tokens leaves no block out.")
        return
    for name, mask in (("critical", critical), ("negligible", negligible)):
        if mask is None:
            continue
        q_len = q.shape[1] if shared is None else shared.tokens
        if (mask.q_len, mask.kv_len) != (q_len, k.shape[1]):
            raise ValueError(
                f"{name} is a mask of {mask.q_len} x {mask.kv_len} tokens, q and k have {q_len} x {k.shape[1]}."
            )
        if (mask.block_q, mask.block_k) != (critical.block_q, critical.block_k):
            raise ValueError(
                f"negligible must have critical's blocks {critical.block_q} x {critical.block_k}, "
                f"got {mask.block_q} x {mask.block_k}."
            )


def check_projection(out: torch.Tensor, q: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise one clear error for a projection that does not fit the heads, or an output that is not q's shape."""
    heads, dim = q.shape[2:]
    if out.shape != q.shape:
        raise ValueError(f"out must have q's shape {tuple(q.shape)}, got {tuple(out.shape)}.")
    if tuple(weight.shape) not in ((dim, dim), (heads, dim, dim)):
        raise ValueError(f"weight must be {(dim, dim)} or {(heads, dim, dim)}, got {tuple(weight.shape)}.")
    if bias is not None and tuple(bias.shape) not in ((dim,), (heads, dim)):
        raise ValueError(f"bias must be {(dim,)} or {(heads, dim)}, got {tuple(bias.shape)}.")
