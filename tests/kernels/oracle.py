"""Independent fp64 oracle, masks and error budgets for the attention kernel tests."""

from __future__ import annotations

from dataclasses import fields

import torch

from dit_accel.kernels import BlockMask
from dit_accel.kernels.common.quantized_inputs import QuantizedInputs

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def on_cpu(quantized: QuantizedInputs) -> QuantizedInputs:
    values = (getattr(quantized, field.name) for field in fields(quantized))
    return QuantizedInputs(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in values))


def permute(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Rows of ``[B, H, S, D]`` in the order ``rows [B|1, H|1, S]``."""
    if rows is None:
        return x
    index = rows.long().expand(*x.shape[:3])[..., None].expand_as(x)
    return x.gather(2, index)


def unpermute(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """The inverse of :func:`permute`."""
    if rows is None:
        return x
    index = rows.long().expand(*x.shape[:3])[..., None].expand_as(x)
    return torch.empty_like(x).scatter(2, index, x)


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    rows: torch.Tensor | None = None,
    scale: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked softmax attention of ``[B, S, H, D]`` inputs in ``dtype``; ``visible`` is in permuted order."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    qh, kh, vh = (permute(x.transpose(1, 2).to(dtype), rows) for x in (q, k, v))
    scores = torch.einsum("bhqd,bhkd->bhqk", qh, kh) * scale
    seen = visible.expand_as(scores)
    peak = scores.masked_fill(~seen, torch.finfo(dtype).min).amax(-1, keepdim=True).detach()
    weights = torch.exp((scores - peak).masked_fill(~seen, -torch.inf))
    total = weights.sum(-1, keepdim=True)
    safe = torch.where(total > 0, total, 1)
    out = torch.einsum("bhqk,bhkd->bhqd", weights / safe, vh)
    lse = torch.where(total > 0, safe.log() + peak, -torch.inf)
    out, lse = unpermute(out, rows), unpermute(lse, rows)
    return out.transpose(1, 2), lse.squeeze(-1)


def random_mask(
    lead: tuple[int, int],
    q_len: int,
    kv_len: int,
    block_q: int,
    block_k: int,
    density: float = 0.4,
    *,
    key_mask: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    bits: bool = False,
    empty_rows: bool = False,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """Random mask with uneven counts; blocks with hidden keys are listed as partial as the contract asks."""
    nq, nk = -(-q_len // block_q), -(-kv_len // block_k)
    keep = torch.rand(*lead, nq, nk) < density
    keep[..., 0] |= ~keep.any(-1)
    partial = None
    if key_mask is not None:
        hidden = ~key_mask.cpu()[:, None]
        if rows is not None:
            hidden = hidden.expand(-1, rows.shape[1], -1).gather(-1, rows.cpu().long().expand(hidden.shape[0], -1, -1))
        padded = torch.nn.functional.pad(hidden, (0, nk * block_k - kv_len))
        partial = padded.unflatten(-1, (nk, block_k)).any(-1)
        partial = partial.any(0, keepdim=True) if lead[0] == 1 else partial
        partial = partial.any(1, keepdim=True) if lead[1] == 1 else partial
        partial = partial[:, :, None]
    bit_rows = token_bits = None
    if bits:
        token_bits = torch.randint(-(2**31), 2**31 - 1, (5, block_q, block_k // 32), dtype=torch.int32)
        bit_rows = torch.randint(-1, 5, (*lead, nq, nk), dtype=torch.int32)
        bit_rows = torch.where(torch.rand(*lead, nq, nk) < 0.5, -1, bit_rows)
        partial = (bit_rows >= 0) if partial is None else partial | (bit_rows >= 0)
    if empty_rows:
        keep[..., nq // 2, :] = False
    mask = BlockMask.from_dense(
        keep, block_q, block_k, q_len, kv_len, partial=partial, bit_rows=bit_rows, token_bits=token_bits
    )
    poison_unlisted(mask)
    return mask.to(device)


def poison_unlisted(mask: BlockMask) -> None:
    """Overwrite entries past ``kv_num_blocks``, which the contract leaves undefined, with a wild value."""
    slot = torch.arange(mask.kv_indices.shape[-1], device=mask.kv_indices.device)
    unlisted = slot >= mask.kv_num_blocks[..., None]
    mask.kv_indices[unlisted] = 2**30
    if mask.kv_bits is not None:
        mask.kv_bits[unlisted] = 2**30


def visible_tokens(
    mask: BlockMask, key_mask: torch.Tensor | None = None, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Token visibility ``[B, H, Sq, Skv]`` in permuted order, block by block from the definition."""
    batch, heads = mask.kv_num_blocks.shape[:2]
    if rows is not None:
        batch, heads = max(batch, rows.shape[0]), max(heads, rows.shape[1])
    if key_mask is not None:
        batch = max(batch, key_mask.shape[0])
    seen = torch.zeros(batch, heads, mask.q_len, mask.kv_len, dtype=torch.bool)
    host = mask.to("cpu")
    for b in range(batch):
        for h in range(heads):
            mb, mh = min(b, len(host.kv_num_blocks) - 1), min(h, host.kv_num_blocks.shape[1] - 1)
            for i in range(mask.num_blocks[0]):
                for slot in range(int(host.kv_num_blocks[mb, mh, i])):
                    j = int(host.kv_indices[mb, mh, i, slot])
                    m0, n0 = i * mask.block_q, j * mask.block_k
                    tile = torch.ones(mask.block_q, mask.block_k, dtype=torch.bool)
                    if slot >= int(host.kv_num_full[mb, mh, i]):
                        row = -1 if host.kv_bits is None else int(host.kv_bits[mb, mh, i, slot])
                        if row >= 0:
                            n = torch.arange(mask.block_k)
                            tile = (host.token_bits[row][:, n // 32] >> (n % 32)).bitwise_and(1).bool()
                        if key_mask is not None:
                            order = torch.arange(mask.kv_len)
                            if rows is not None:
                                order = rows[min(b, len(rows) - 1), min(h, rows.shape[1] - 1)].long().cpu()
                            keys = key_mask[b].cpu()[order[n0 : n0 + mask.block_k]]
                            tile[:, : len(keys)] &= keys
                    tile = tile[: mask.q_len - m0, : mask.kv_len - n0]
                    seen[b, h, m0 : m0 + tile.shape[0], n0 : n0 + tile.shape[1]] = tile
    return seen


def random_rows(lead: tuple[int, int], length: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.rand(*lead, length).argsort(-1).to(dtype)


def assert_close(actual: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    """Error at most the eager computation's own error plus a rounding budget.

    ``exact`` is float64. ``eager`` is what plain torch gives in ``dtype``. The budget is a few roundings of
    the largest value: one for each of the stored probabilities, the accumulation order and the output.
    """
    exact = exact.double()
    actual_error = (actual.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    budget = 4 * UNIT_ROUNDOFF[dtype] * exact.abs().max().item()
    assert actual_error <= 2 * eager_error + budget, (
        f"{what}: error {actual_error:.3e}, eager {eager_error:.3e}, budget {budget:.3e}"
    )
