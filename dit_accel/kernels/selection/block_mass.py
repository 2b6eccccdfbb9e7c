"""Exact attention mass of every block pair, streamed: the search step of AdaSpa (arXiv 2502.21079)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..common.capability import why_not_tiles
from ..common.choice import Case, Choice, case_of, choose
from ..common.scale import scale_of
from ..common.tokens import gather_mask, gather_rows
from ..mask.pairs import PairMask
from .pairs import block_mass_under

CHUNK_VALUES = 1 << 22
"""The torch version holds about this many shares of the mass at a time on a CPU, logits elsewhere."""


def choose_block_mass(case: Case, backend: str = "auto") -> Choice:
    """The backend of :func:`block_mass`; raises a ValueError if it is refused."""
    return choose("block_mass", backend, case, why_not_tiles(case))


def block_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block_q: int,
    block_k: int,
    lse: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    seen: PairMask | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax probability summed over each block pair, and the log-sum-exp it was normalised with.

    ``mass[I, J]`` is the sum over queries i of block I and keys j of block J of
    ``exp(scale * q_i . k_j - lse_i)``, so with an exact ``lse`` the masses of a row of blocks add up to the
    number of its queries. One pass over the logits with ``lse`` given, two without; no S×S tensor. Passing
    the ``lse`` of an earlier denoising step is AdaSpa's cached search. (The paper's listing prints Log for
    exp.)

    Args:
        q, k: ``[B, Sq, H, D]`` and ``[B, Sk, H, D]``, any strides.
        block_q, block_k: tokens in a query and in a key block; powers of two from 16 for Triton.
        lse: optional float32 ``[B, H, Sq]``, natural logarithm, in the queries' original order.
        rows: optional permutation of queries and keys, see :func:`dit_accel.kernels.selection.api.pool_blocks`.
        key_mask: optional bool ``[B, Sk]``, visible keys in original order.
        seen: optional, which keys each query sees, in place of ``key_mask``: of the permuted sequence, by these
            blocks. Triton needs the ``lse`` over what is seen with it.
        scale: softmax scale, ``D ** -0.5`` when left out.
        backend: one of :data:`~dit_accel.kernels.BACKENDS`; ``"auto"`` is Triton on CUDA.

    Returns:
        ``(mass, lse)``: float32 ``[B, H, nq, nk]``, and ``[B, H, Sq]`` in original order. A query that sees
        no key has ``lse`` -inf and contributes no mass.

    Raises:
        ValueError: shapes that do not fit, or ``seen`` without an ``lse`` on Triton or beside a ``key_mask``.
    """
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"q and k must agree in batch, heads and head dim, got {tuple(q.shape)} and {tuple(k.shape)}.")
    if seen is not None and key_mask is not None:
        raise ValueError("block_mass takes a key_mask or the pairs that are seen, got both.")
    scale = scale_of(q, scale)
    if choose_block_mass(case_of(q, k, blocks=(block_q, block_k)), backend).name == "triton":
        from .triton.block_mass import block_mass_triton

        if seen is not None and lse is None:
            raise ValueError("block_mass on Triton needs the log-sum-exp of what is seen, got none.")
        mass, lse = block_mass_triton(
            q, k, block_q=block_q, block_k=block_k, lse=lse, rows=rows, key_mask=key_mask,
            scale=scale,
        )  # fmt: skip
        if seen is not None:
            mass = block_mass_under(mass, lse, q, k, seen, rows=rows, scale=scale)
        return mass, lse
    return _block_mass_torch(q, k, block_q, block_k, lse, rows, key_mask, seen, scale)


def strided_block_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block_q: int,
    block_k: int,
    query_stride: int,
    lse: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    seen: PairMask | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """:func:`block_mass` of one query of every n in a block, which stands for all of them.

    Each sampled query has its exact softmax over all keys. Masses are scaled to the tokens of their query block, so
    that those of a row of blocks add up to the number of its queries, as the exact ones do.

    Args:
        query_stride: n, a divisor of ``block_q``; the first slot of each block is one of the sample, see
            :func:`sampled_slots`; with ``seen`` the first of every n. Triton needs blocks of 16 queries that are left.
        q, k, block_q, block_k, lse, rows, key_mask, seen, scale, backend: as for :func:`block_mass`.

    Returns:
        float32 ``[B, H, nq, nk]``.

    Raises:
        ValueError: the stride does not divide the block, or what :func:`block_mass` raises.
    """
    if query_stride < 1 or block_q % query_stride:
        raise ValueError(f"query_stride must divide a query block of {block_q} tokens, got {query_stride}.")
    tokens, heads = q.shape[1:3]
    if seen is None:
        slots = sampled_slots(tokens, block_q, query_stride, q.device)
    else:  # whose blocks of token pairs many pairs of blocks share: the same slots of each
        slots = torch.arange(0, tokens, query_stride, device=q.device)
    if rows is None:
        q, lse = q[:, slots], None if lse is None else lse[..., slots]
    else:
        sample = rows[..., slots]
        lse = None if lse is None else torch.take_along_dim(lse, sample.long(), dim=2)
        q, k = gather_rows(q, sample).transpose(1, 2), gather_rows(k, rows).transpose(1, 2)
        if key_mask is not None:
            key_mask = gather_mask(key_mask, rows)
            if key_mask.shape[1] == 1:
                key_mask = key_mask[:, 0]
            else:
                # Each head has its own order, and so its own mask: heads become samples of a batch.
                q, k = (x.transpose(1, 2).flatten(0, 1)[:, :, None] for x in (q, k))
                lse, key_mask = None if lse is None else lse.flatten(0, 1)[:, None], key_mask.flatten(0, 1)
    mass, _ = block_mass(
        q,
        k,
        block_q=block_q // query_stride,
        block_k=block_k,
        lse=lse,
        key_mask=key_mask,
        seen=None if seen is None else seen.every(query_stride),
        scale=scale,
        backend=backend,
    )
    mass = mass.view(-1, heads, *mass.shape[2:])
    last = (tokens - 1) % block_q + 1
    mass[:, :, :-1] *= query_stride
    mass[:, :, -1] *= last / -(-last // query_stride)
    return mass


def sampled_slots(tokens: int, block: int, stride: int, device: torch.device) -> torch.Tensor:
    """int64 ``[ceil(tokens / stride)]``: one slot of every ``stride``, not always the first.

    Which one is the sum of the digits of its number within the block, to the base ``stride``: so no row or column of a
    block of a grid is left out. Behind the last token it is the last token.
    """
    number = torch.arange(-(-tokens // stride), device=device)
    if stride == 1:
        return number
    place, rest, left = torch.zeros_like(number), number % (block // stride), block // stride
    while left > 1:
        place, rest, left = place + rest % stride, rest // stride, left // stride
    return (number * stride + place % stride).clamp_max(tokens - 1)


@torch.no_grad()
def _block_mass_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    block_q: int,
    block_k: int,
    lse: torch.Tensor | None,
    rows: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    pairs: PairMask | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block mass as attention to values that say in which block a key lies, a head dim of blocks at a time."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, q_len, heads, dim = q.shape
    kv_len = k.shape[1]
    nq, nk = -(-q_len // block_q), -(-kv_len // block_k)
    q_slots, keys = gather_rows(q, rows), gather_rows(k, rows).to(wide).contiguous()
    visible = None if key_mask is None else gather_mask(key_mask, rows)
    if visible is not None:
        # A logit that overflows would outlive the mask: inf - inf is NaN.
        keys = keys.masked_fill(~visible[..., None], 0.0)
        visible = visible[:, :, None]
    given = None
    if lse is not None:
        given = lse.to(wide) if rows is None else torch.take_along_dim(lse.to(wide), rows.long(), dim=2)
    width = dim * block_k
    spans = [slice(begin, min(begin + width, kv_len)) for begin in range(0, kv_len, width)]
    block_of_key = torch.arange(min(width, kv_len), device=q.device) // block_k
    values = (block_of_key[:, None] == torch.arange(dim, device=q.device)).to(wide).expand(batch, heads, -1, dim)

    mass = torch.empty(batch, heads, nq, nk, dtype=torch.float32, device=q.device)
    slots = torch.empty(batch, heads, q_len, dtype=wide, device=q.device)
    held = len(spans) * dim if q.device.type == "cpu" else len(block_of_key)
    step = max(1, CHUNK_VALUES // (batch * heads * block_q * held)) * block_q
    for begin in range(0, q_len, step):
        part = slice(begin, min(begin + step, q_len))
        queries = q_slots[:, :, part].to(wide).contiguous()
        if pairs is not None:
            visible = pairs.tokens(begin // block_q, -(-part.stop // block_q))[:, :, : queries.shape[2], :kv_len]
        shares, logs = zip(*(_attend(queries, keys, values, visible, span, scale) for span in spans))
        slots[:, :, part] = torch.stack(logs).logsumexp(0)
        shift = (slots if given is None else given)[:, :, part]
        # A query without visible keys: exp(-inf - inf) is 0, exp(-inf + inf) would be NaN.
        shift = shift.masked_fill(shift == -torch.inf, torch.inf)
        short = -queries.shape[2] % block_q
        first = begin // block_q
        for share, log, span in zip(shares, logs, spans):
            share = share.mul_((log - shift).exp()[..., None])
            share = F.pad(share, (0, 0, 0, short)) if short else share
            columns = slice(span.start // block_k, -(-span.stop // block_k))
            found = share.unflatten(2, (-1, block_q)).sum(3)
            mass[:, :, first : first + found.shape[2], columns] = found[..., : columns.stop - columns.start]
    if lse is not None:
        return mass, lse
    if rows is None:
        return mass, slots.float()
    index = rows.long().expand(batch, heads, q_len)
    return mass, torch.empty_like(slots, dtype=torch.float32).scatter_(2, index, slots.float())


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None, span: slice, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention ``[B, H, n, D]`` to a span of the keys and its log-sum-exp ``[B, H, n]``; 0 and -inf where no key of
    it is ``visible [B|1, H|1, n|1, Sk]``. Values are those of any span from its begin."""
    k, v = k[:, :, span], v[:, :, : span.stop - span.start]
    bias = seen = None
    if visible is not None:
        seen = visible[..., span]
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
    if q.device.type == "cpu":
        # One parallel region. Many small ones cost a busy machine several times the work between them.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    else:
        logits = q @ k.transpose(-1, -2) * scale
        logits = logits if bias is None else logits + bias
        lse = logits.logsumexp(-1)
        out = (logits - lse[..., None]).exp() @ v
    if seen is not None:
        blind = ~seen.any(-1)
        out, lse = out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -torch.inf)
    return out, lse
