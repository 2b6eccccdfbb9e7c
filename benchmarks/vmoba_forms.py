"""VMoBA gates every query by itself; block kernels share a gate among a block of queries. What does that cost?

Queries and keys are taken from a denoising run of the built-in model. For every layer and head both forms keep
the same share of the (query, key) pairs, by bisection of their thresholds, and are compared by the attention
mass they keep and by the relative error of the attention output. The query's own chunk is kept by both.

    python benchmarks/vmoba_forms.py --density 0.2 --json vmoba_forms.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from dit_accel import patch
from dit_accel.call import AttentionCall
from dit_accel.kernels.selection.api import own_blocks
from dit_accel.kernels.selection.gate import global_choice
from dit_accel.layout import TokenLayout
from dit_accel.pipelines.builtin import builtins
from dit_accel.pipelines.generate import generate
from dit_accel.stages.order.simple import Tiles
from dit_accel.stages.select.gate import per_query_chunks

CHUNK = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", choices=list(builtins()))
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, nargs="+", help="all if left out")
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 128], help="queries that share a gate")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    calls = [call for call in observe(args.model, args.steps) if args.layers is None or call.layer in args.layers]
    forms: dict[str, list[list[float]]] = {}
    for call in calls:
        for name, figures in compare(call, args.density, args.blocks).items():
            forms.setdefault(name, []).append(figures)
    table = {name: [sum(column) / len(column) for column in zip(*rows)] for name, rows in forms.items()}
    print(f"{len(calls)} calls, {calls[0].q.shape[1]} tokens, density {args.density}, torch {torch.__version__}")
    print(f"{'form':<24}{'density':>9}{'mass kept':>11}{'rel. error':>12}")
    for name, (density, mass, error) in table.items():
        print(f"{name:<24}{density:>9.3f}{mass:>11.3f}{error:>12.3f}")
    if args.json:
        args.json.write_text(json.dumps({"model": args.model, "calls": len(calls), "forms": table}, indent=1) + "\n")


def observe(model: str, steps: int) -> list[AttentionCall]:
    """Every layer's call at the middle step, first item of the batch, first forward of the step."""
    found: dict[int, AttentionCall] = {}

    def watch(_: str, call: AttentionCall) -> None:
        if call.step.index == steps // 2 and isinstance(call.layout, TokenLayout):
            found.setdefault(call.layer, call)

    chosen = builtins()[model]
    size = chosen.settings
    pipe = chosen.build(torch.float32)
    with patch(pipe, "dense") as handle, handle.observe(watch), torch.no_grad():
        generate(
            pipe,
            "a red ball",
            width=size.width,
            height=size.height,
            frames=size.frames,
            guidance=size.guidance,
            steps=steps,
        )
    return [found[layer] for layer in sorted(found)]


def compare(call: AttentionCall, density: float, blocks: list[int]) -> dict[str, list[float]]:
    """Density, kept mass and relative error of each form, averaged over batch and heads."""
    assert isinstance(call.layout, TokenLayout)
    rows = Tiles((4, 4, 4)).rows(call.layout, call.q.device)
    assert rows is not None
    q, k, v = (x[:1, rows.long()] for x in (call.q, call.k, call.v))
    tokens = q.shape[1] // CHUNK * CHUNK
    q, k, v = q[:, :tokens], k[:, :tokens], v[:, :tokens]
    chunk = torch.arange(tokens) // CHUNK
    values = v.float().transpose(1, 2)
    prob = (q.float().transpose(1, 2) * q.shape[-1] ** -0.5 @ k.float().permute(0, 2, 3, 1)).softmax(-1)
    exact = prob @ values

    def per_block(size: int) -> Callable[[float], torch.Tensor]:
        means = q.double()[:, : tokens // size * size].unflatten(1, (-1, size)).mean(2)
        keys = k.double().unflatten(1, (-1, CHUNK)).mean(2)
        gates = torch.einsum("bihd,bjhd->bhij", means, keys)
        own = own_blocks(size, CHUNK, tokens, tokens, q.device).expand(gates.shape)
        return lambda t: global_choice(gates, torch.ones_like(own), own, t).repeat_interleave(size, 2)

    forms = {"per query": lambda t: per_query_chunks(q, k, chunk, t)}
    forms |= {f"per block of {size}": per_block(size) for size in blocks if tokens % size == 0}
    out = {}
    for name, form in forms.items():
        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            low, high = (middle, high) if form(middle).double().mean() < density else (low, middle)
        keep = form(high).repeat_interleave(CHUNK, 3)
        kept = prob * keep
        mass = kept.sum(-1)
        sparse = kept @ values / mass[..., None]
        error = (sparse - exact).norm() / exact.norm()
        out[name] = [float(keep.float().mean()), float(mass.mean()), float(error)]
    return out


if __name__ == "__main__":
    main()
