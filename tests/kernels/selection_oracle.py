"""Selection from its definition: plain loops, one row at a time."""

from __future__ import annotations

import math
from fractions import Fraction

import torch

from dit_accel.kernels.mask.block_mask import BlockMask


def at(mask: torch.Tensor | None, b: int, h: int, i: int) -> bool:
    """Entry of a [n], [B|1, n] or [B|1, H|1, n] mask."""
    if mask is None:
        return False
    if mask.dim() == 1:
        return bool(mask[i])
    if mask.dim() == 2:
        return bool(mask[min(b, mask.shape[0] - 1), i])
    return bool(mask[min(b, mask.shape[0] - 1), min(h, mask.shape[1] - 1), i])


def loop_select(scores, *, block_q, block_k, q_len, kv_len, density=None, top_p=None, forced_q=None,
                forced_k=None, partial_k=None, empty_k=None, keep_own=True):  # fmt: skip
    """(full, partial) ascending lists per row, from the definition, one row at a time."""
    batch, heads, nq, nk = scores.shape
    result = {}
    for b in range(batch):
        for h in range(heads):
            for i in range(nq):
                row = [float(x) for x in scores[b, h, i]]
                row = [-math.inf if math.isnan(x) else x for x in row]
                alive = [j for j in range(nk) if not at(empty_k, b, h, j)]
                cand = [j for j in alive if not at(forced_k, b, h, j)]
                ranked = sorted(cand, key=lambda j: (-row[j], j))
                kept = {j for j in alive if at(forced_k, b, h, j)}
                if at(forced_q, b, h, i):
                    kept |= set(alive)
                if density is not None and cand:
                    share = density if isinstance(density, float) else float(density[b, h])
                    share = Fraction(round(share * 10**6), 10**6)
                    kept |= set(ranked[: max(1, math.ceil(share * len(cand)))])
                if top_p is not None and cand:
                    best = max(row[j] for j in cand)
                    weight = {j: math.exp(row[j] - best) if row[j] > -math.inf else 0.0 for j in cand}
                    total, mass = sum(weight.values()), 0.0
                    for j in ranked:
                        if mass >= top_p * total and mass > 0:
                            break
                        kept.add(j)
                        mass += weight[j]
                if keep_own:
                    mine = set(range(i * block_q, min((i + 1) * block_q, q_len)))
                    kept |= {j for j in alive if mine & set(range(j * block_k, (j + 1) * block_k))}
                short = [j for j in kept if (j + 1) * block_k > kv_len or at(partial_k, b, h, j)]
                result[b, h, i] = (sorted(kept - set(short)), sorted(short))
    return result


def assert_lists(mask: BlockMask, expected) -> None:
    for (b, h, i), (full, partial) in expected.items():
        n, n_full = int(mask.kv_num_blocks[b, h, i]), int(mask.kv_num_full[b, h, i])
        got = mask.kv_indices[b, h, i, :n].tolist()
        assert got == full + partial, f"row {b, h, i}"
        assert n_full == len(full), f"row {b, h, i}"
