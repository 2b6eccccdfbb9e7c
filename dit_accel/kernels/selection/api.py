"""Dynamic selection: pooled scores, and top-k / top-p block lists from any block scores.

Everything here is exact and deterministic: ties go to the lower block index, densities and masses are
compared in integers (parts per million), so the torch and the Triton implementation list the same blocks
for the same scores. Nothing synchronises with the host and nothing is quadratic in tokens.

References: SpargeAttn (arXiv 2502.18137) and SLA (2509.24006) for pooled scores, SpargeAttention2
(2602.13515) for the union of top-k and top-p, AdaSpa (2502.21079) for one density per head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..common.capability import choose_selection
from ..common.choice import Case
from ..common.scale import scale_of
from ..common.shares import PPM, WEIGHT_ONE, share_in_ppm
from ..common.tokens import gather_mask, gather_rows, hidden_blocks
from ..mask.block_mask import BlockMask

MAX_BLOCKS = 16_384


def pool_blocks(
    x: torch.Tensor,
    block: int,
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Mean over the valid tokens of each block.

    Args:
        x: ``[B, S, H, D]`` with any strides; a short last block is averaged over the tokens it has.
        block: tokens in a block.
        rows: optional int ``[B|1, H|1, S]`` permutation, slot ``n`` reads original row ``rows[b, h, n]``.
        key_mask: optional bool ``[B, S]`` in original order; hidden tokens (False) do not count, whatever
            they hold, and a block of hidden tokens gives 0.
        backend: one of :data:`~dit_accel.kernels.BACKENDS`; ``"auto"`` is Triton on CUDA.

    Returns:
        float32 ``[B, H, n, D]`` with ``n = ceil(S / block)``.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1 token, got {block}.")
    if choose_selection(Case(x.device), backend).name == "triton":
        from .triton.pooling import pool_blocks_triton

        return pool_blocks_triton(x, block, rows=rows, key_mask=key_mask)
    return _pool(x, block, rows, key_mask, torch.float32)


def pool_two(
    x: torch.Tensor,
    y: torch.Tensor,
    block: int,
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> torch.Tensor:
    """:func:`pool_blocks` of two tensors of one shape, in Triton in one launch.

    Returns:
        ``[2, B, H, n, D]`` of ``dtype``; sums are float32, and float64 where that is asked for.
    """
    if choose_selection(Case(x.device), backend).name == "triton":
        from .triton.pooling import pool_two_triton

        return pool_two_triton(x, y, block, rows=rows, key_mask=key_mask, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return torch.stack([_pool(each, block, rows, key_mask, wide).to(dtype) for each in (x, y)])


def _pool(
    x: torch.Tensor, block: int, rows: torch.Tensor | None, key_mask: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """:func:`pool_blocks` in torch, with sums and results of a dtype."""
    seq = x.shape[1]
    x = gather_rows(x, rows)
    pad = -seq % block
    if key_mask is None:
        n = (seq + pad) // block
        count = torch.full((n,), block, dtype=dtype, device=x.device)
        count[-1] = block - pad
        total = F.pad(x, (0, 0, 0, pad)).unflatten(2, (n, block)).sum(3, dtype=dtype)
        return total / count[:, None]
    visible = gather_mask(key_mask, rows)
    count = F.pad(visible, (0, pad)).unflatten(-1, (-1, block)).sum(-1, dtype=dtype)
    # where, not a product: a padded prompt may hold NaN.
    x = torch.where(visible[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))
    total = F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, block)).sum(3, dtype=dtype)
    return total / count.clamp(min=1)[..., None]


def self_similarity(
    x: torch.Tensor,
    block: int,
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    centre: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Mean cosine over all pairs of valid tokens of a block, each with itself included (SpargeAttn).

    The mean of a Gram matrix of unit vectors is the squared length of their mean: one pass, and no division by
    the padding of a short block.

    Args:
        x, block, rows, key_mask, backend: see :func:`pool_blocks`.
        centre: float32 ``[B, H, D]``, subtracted from every token first.

    Returns:
        float32 ``[B, H, n]``; 0 for a block of hidden tokens.
    """
    if choose_selection(Case(x.device), backend).name == "triton":
        from .triton.spread import self_similarity_triton

        return self_similarity_triton(x, block, rows=rows, key_mask=key_mask, centre=centre)
    wide = x.float() if centre is None else x.float() - centre[:, None]
    length = wide.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return pool_blocks(wide / length, block, rows=rows, key_mask=key_mask, backend=backend).square().sum(-1)


def pooled_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    block_q: int,
    block_k: int,
    *,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Logits of block means: ``scale * mean(q block) . mean(k block)``.

    Args:
        q: ``[B, Sq, H, D]``, any strides.
        k: ``[B, Sk, H, D]``, any strides.
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        rows: optional permutation of queries and keys, see :func:`pool_blocks`.
        key_mask: optional bool ``[B, Sk]``, visible keys in original order. Queries are never hidden.
        scale: softmax scale, ``D ** -0.5`` when left out.

    Returns:
        float32 ``[B, H, nq, nk]``. A block of hidden keys scores 0: give ``empty_k`` to the selection.
    """
    scale = scale_of(q, scale)
    if choose_selection(Case(q.device), backend).name == "triton":
        from .triton.pooling import pool_pair_triton

        q_mean, k_mean = pool_pair_triton(q, k, block_q, block_k, rows=rows, key_mask=key_mask, scale=scale)
        # Without the views and copies that matmul considers.
        scores = torch.bmm(q_mean, k_mean)
        nq, wide = scores.shape[1:]
        size = (q.shape[0], q.shape[2], nq, -(-k.shape[1] // block_k))
        return scores.as_strided(size, (size[1] * nq * wide, nq * wide, wide, 1))
    q_mean = pool_blocks(q, block_q, rows=rows, backend=backend) * scale
    k_mean = pool_blocks(k, block_k, rows=rows, key_mask=key_mask, backend=backend)
    return q_mean @ k_mean.transpose(-1, -2)


def expand_blocks(mask: torch.Tensor | None, last: int, name: str) -> torch.Tensor | None:
    """A per-block bool mask ``[n]``, ``[B|1, n]`` or ``[B|1, H|1, n]`` as ``[B|1, H|1, n]``."""
    if mask is None:
        return None
    if not 1 <= mask.dim() <= 3 or mask.shape[-1] != last:
        raise ValueError(f"{name} must be bool [{last}], [B, {last}] or [B, H, {last}], got {tuple(mask.shape)}.")
    if mask.dtype != torch.bool:
        mask = mask.bool()
    return mask if mask.dim() == 3 else mask.reshape(-1, 1, last)


def select_blocks(
    scores: torch.Tensor,
    *,
    block_q: int,
    block_k: int,
    q_len: int,
    kv_len: int,
    density: float | torch.Tensor | None = None,
    top_p: float | torch.Tensor | None = None,
    forced_q: torch.Tensor | None = None,
    forced_k: torch.Tensor | None = None,
    partial_k: torch.Tensor | None = None,
    empty_k: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    keep_own: bool = True,
    backend: str = "auto",
) -> BlockMask:
    """Key blocks to read, from the scores of block pairs.

    The candidates of a query block are the key blocks that are neither forced, empty nor hidden from it. ``density``
    keeps the ``max(1, ceil(density * candidates))`` best of them; ``top_p`` keeps the fewest, best first, whose
    softmax weights over the candidates reach ``top_p`` (at least one). Both together keep the union. Ties go
    to the lower index; NaN scores rank last.

    Args:
        scores: ``[B, H, nq, nk]`` logits (larger is better; compared in float32).
        block_q: tokens in a query block.
        block_k: tokens in a key block.
        q_len: queries.
        kv_len: keys.
        density: share of the candidates to keep, in (0, 1]; or a tensor that broadcasts to ``[B, H]`` with
            one share per head (values outside are clamped, since looking at them would synchronise).
        top_p: softmax mass to keep, in (0, 1]; or such a tensor.
        forced_q: bool ``[nq]``, ``[B|1, nq]`` or ``[B|1, H|1, nq]``: query blocks that read every key block.
        forced_k: bool, likewise over ``nk``: key blocks that every query block reads.
        partial_k: bool, likewise over ``nk``: key blocks with hidden keys; the mask lists them last.
        empty_k: bool, likewise over ``nk``: key blocks without any visible key; never selected.
        hidden: bool ``[B|1, H|1, nq, nk]``: pairs of blocks of which no query sees a key; never selected.
        keep_own: also keep the key blocks that overlap the query block's own token range.
        backend: one of :data:`~dit_accel.kernels.BACKENDS`; ``"auto"`` is Triton on CUDA.

    Returns:
        The mask, with full blocks in ascending order first and then the partial ones in ascending order.

    Raises:
        ValueError: a share outside (0, 1], neither share given, or a shape that does not fit.
    """
    if density is None and top_p is None:
        raise ValueError("select_blocks needs density, top_p or both, got neither.")
    nq, nk = -(-q_len // block_q), -(-kv_len // block_k)
    if scores.dim() != 4 or tuple(scores.shape[2:]) != (nq, nk):
        raise ValueError(f"scores must be [B, H, {nq}, {nk}] for this geometry, got {tuple(scores.shape)}.")
    if nk > MAX_BLOCKS:
        raise ValueError(f"At most {MAX_BLOCKS} key blocks are supported, got {nk}; use larger blocks.")
    count_ppm = None if density is None else share_in_ppm(density, "density", scores.device)
    mass_ppm = None if top_p is None else share_in_ppm(top_p, "top_p", scores.device)
    forced_q = expand_blocks(forced_q, nq, "forced_q")
    forced_k = expand_blocks(forced_k, nk, "forced_k")
    partial_k = expand_blocks(partial_k, nk, "partial_k")
    empty_k = expand_blocks(empty_k, nk, "empty_k")
    if hidden is not None and (hidden.dim() != 4 or tuple(hidden.shape[2:]) != (nq, nk)):
        raise ValueError(f"hidden must be bool [B, H, {nq}, {nk}], got {tuple(hidden.shape)}.")
    if choose_selection(Case(scores.device), backend).name == "triton":
        from .triton.topk import select_blocks_triton

        return select_blocks_triton(
            scores,
            count_ppm=count_ppm,
            mass_ppm=mass_ppm,
            forced_q=forced_q,
            forced_k=forced_k,
            partial_k=partial_k,
            empty_k=empty_k,
            hidden=hidden,
            keep_own=keep_own,
            block_q=block_q,
            block_k=block_k,
            q_len=q_len,
            kv_len=kv_len,
        )
    open_k = torch.ones(1, 1, nk, dtype=torch.bool, device=scores.device)
    if empty_k is not None:
        open_k = ~empty_k
    opened = open_k[..., None, :] if hidden is None else open_k[..., None, :] & ~hidden
    candidates = opened if forced_k is None else opened & ~forced_k[..., None, :]
    keep = best_candidates(scores, candidates, count_ppm, mass_ppm)
    if forced_k is not None:
        keep = keep | forced_k[..., None, :]
    if forced_q is not None:
        keep = keep | forced_q[..., None]
    if keep_own:
        keep = keep | own_blocks(block_q, block_k, q_len, kv_len, scores.device)
    keep = keep & opened
    partial = None if partial_k is None else partial_k[..., None, :]
    return BlockMask.from_dense(keep, block_q, block_k, q_len, kv_len, partial=partial, backend="torch")


def own_blocks(block_q: int, block_k: int, q_len: int, kv_len: int, device: torch.device) -> torch.Tensor:
    """bool ``[nq, nk]``: key blocks that overlap the tokens of the query block."""
    first_q = torch.arange(0, q_len, block_q, device=device)[:, None]
    first_k = torch.arange(0, kv_len, block_k, device=device)
    return (first_k < (first_q + block_q).clamp(max=q_len)) & (first_k + block_k > first_q)


def best_candidates(
    scores: torch.Tensor,
    candidates: torch.Tensor,
    count_ppm: int | torch.Tensor | None,
    mass_ppm: int | torch.Tensor | None,
) -> torch.Tensor:
    """bool ``[B, H, nq, nk]``: union of the top-k and top-p choices among ``candidates [B|1, H|1, nq|1, nk]``."""
    big = torch.finfo(torch.float32).max
    scores = torch.nan_to_num(scores.float(), nan=-big, posinf=big, neginf=-big)
    allowed = candidates.expand(scores.shape)
    ranked = torch.where(allowed, scores, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    chosen = torch.zeros_like(allowed)
    if count_ppm is not None:
        ppm = count_ppm[..., None, None] if isinstance(count_ppm, torch.Tensor) else count_ppm
        count = (candidates.sum(-1, dtype=torch.int64, keepdim=True) * ppm + (PPM - 1)) // PPM
        chosen = rank < count
    if mass_ppm is not None:
        ppm = mass_ppm[..., None, None] if isinstance(mass_ppm, torch.Tensor) else mass_ppm
        best = ranked.amax(-1, keepdim=True)
        # Integer weights make the sum independent of its order; +1 keeps every candidate's weight positive.
        weight = (torch.exp(ranked - best) * WEIGHT_ONE).to(torch.int64) + 1
        weight = torch.where(allowed, weight, 0)
        mass = weight.gather(-1, order)
        before = mass.cumsum(-1) - mass
        chosen = chosen | (before * PPM < weight.sum(-1, keepdim=True) * ppm)
    chosen = torch.zeros_like(allowed).scatter_(-1, order, chosen.expand(scores.shape))
    return chosen & allowed


def select_pooled(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block_q: int,
    block_k: int,
    density: float | torch.Tensor | None = None,
    top_p: float | torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    forced_q: torch.Tensor | None = None,
    forced_k: torch.Tensor | None = None,
    keep_own: bool = True,
    scale: float | None = None,
    backend: str = "auto",
) -> BlockMask:
    """Pooled scores of q ``[B, Sq, H, D]`` and k ``[B, Sk, H, D]``, then selection, in one call.

    The arguments are those of :func:`pooled_scores` and :func:`select_blocks`; blocks that ``key_mask``
    hides in full are never selected, and those that it hides in part are listed as partial.
    """
    scores = pooled_scores(q, k, block_q, block_k, rows=rows, key_mask=key_mask, scale=scale, backend=backend)
    empty = partial = None
    if key_mask is not None:
        empty, partial = hidden_blocks(key_mask, block_k, rows=rows)
    return select_blocks(
        scores,
        block_q=block_q,
        block_k=block_k,
        q_len=q.shape[1],
        kv_len=k.shape[1],
        density=density,
        top_p=top_p,
        forced_q=forced_q,
        forced_k=forced_k,
        partial_k=partial,
        empty_k=empty,
        keep_own=keep_own,
        backend=backend,
    )
