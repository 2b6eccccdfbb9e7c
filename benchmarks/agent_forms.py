"""Agent attention with tokens merged by similarity (AgentSD, of arXiv 2312.08874) as plain forms on recorded calls.

AgentSD merges tokens as ToMe does before it forms keys and agents: in each cell of the grid one token stays, and of
all others the most alike are averaged into the one that is most alike. Here queries, keys and values of a call are
merged by the cosine of keys (of queries for agents), since a call has nothing before them. Work is a share of the
products of dense attention. Nothing is trained; errors are relative L2 errors of the attention outputs.

- ``agents``: the preset, mean queries of tiles of 2 x 2 x 2.
- ``merged agents``: as many, by similarity; ``..., merged keys``: and they read keys of which 0.4 are merged.
- ``..., plain``: the usual scale in both attentions, and no values added.
- ``merged keys``: attention to merged keys, a mean of n with ``+ ln n``, without agents.
- ``pooled``: block selection of as much work.

    python benchmarks/agent_forms.py --out agent_forms.json
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from judged_calls import arguments, dense, report, sparse
from merged_tokens import Merging, merging, through
from reference_forms import tuning_calls

from dit_accel.call import AttentionCall
from dit_accel.layout import TokenLayout
from dit_accel.stages.compensate.agent import AgentTokens
from dit_accel.stages.order.sorted import tile_numbers
from dit_accel.stages.select.learned import Learned
from dit_accel.training.gate import blocks_of

SHARPEN, SHORTCUT = AgentTokens().sharpen, AgentTokens().shortcut
TILE, CELL = (2, 2, 2), (1, 4, 4)
KEYS_MERGED = 0.4


def forms(call: AttentionCall) -> dict[str, tuple[torch.Tensor, float]]:
    """Outputs ``[B, H, S, D]`` and their work by name."""
    assert isinstance(call.layout, TokenLayout)
    q, k, v = (x.transpose(1, 2).float() for x in (call.q, call.k, call.v))
    grid, tokens, scale = call.layout.grid, q.shape[2], call.scale
    place = tile_numbers(grid, TILE, torch.device("cpu"))
    by_place, alike = Merging(place.expand(q.shape[:3]), int(place.max()) + 1), merging(q, grid, TILE, 1.0)
    keys = merging(k, grid, CELL, KEYS_MERGED)
    fewer = merging(k, grid, (1, 2, 2), 1.0)
    agents, best = by_place.means(q), alike.means(q)
    k_means, v_means = keys.means(k), keys.means(v)
    few = scale * q @ fewer.means(k).transpose(-1, -2) + fewer.sizes(k).log()[:, :, None]
    work = 2 * alike.count / tokens
    merged_work = alike.count * (keys.count + tokens) / tokens**2
    found = {
        "agents": (through(q, agents, k, v, scale, SHARPEN) + SHORTCUT * v, 2 * by_place.count / tokens),
        "agents, plain": (through(q, agents, k, v, scale, 1.0), 2 * by_place.count / tokens),
        "merged agents": (through(q, best, k, v, scale, SHARPEN) + SHORTCUT * v, work),
        "merged agents, plain": (through(q, best, k, v, scale, 1.0), work),
        "merged agents, merged keys": (
            through(q, best, k_means, v_means, scale, SHARPEN) + SHORTCUT * v,
            merged_work,
        ),
        "merged keys": (few.softmax(-1) @ fewer.means(v), fewer.count / tokens),
    }
    for density in (0.1, merged_work, work):
        found[f"pooled at {density:.2f}"] = sparse(call, blocks_of(call, Learned()), density)
    return found


def main() -> None:
    parser = arguments(__doc__, device="cpu")
    parser.add_argument("--prompts", type=int, default=1)
    args = parser.parse_args()
    begin = time.monotonic()
    torch.set_grad_enabled(False)
    tests = tuning_calls(args)
    rows: dict[str, dict[str, float]] = {}
    norm = 0.0
    for call in tests:
        exact = dense(call)
        norm += float(exact.square().sum())
        for name, (out, work) in forms(call).items():
            row = rows.setdefault(name, {"error": 0.0, "work": 0.0})
            row["error"] += float((out - exact).square().sum())
            row["work"] += work / len(tests)
    for row in rows.values():
        row["error"] = math.sqrt(row["error"] / norm)
    result: dict[str, Any] = {"calls": len(tests), "tokens": tests[0].q.shape[1], "rows": rows}
    report(result, args, begin)


if __name__ == "__main__":
    main()
