"""Why one method keeps more fidelity than another: what their masks hold on recorded queries and keys.

For each method at one density, on calls of a dense run of the embedded model: the exact attention mass that the mask
keeps, the relative error of the attention output (compensation included), the mean cosine between a query block's
queries and their mean, and the mass that the mask of the first recorded step keeps at the last one.

    python benchmarks/fidelity_reasons.py --density 0.3 --layers 1 3 5 7 --json fidelity_reasons.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from fidelity_presets import METHODS, at_density, method

from dit_accel import patch
from dit_accel.call import AttentionCall, AttentionInputs
from dit_accel.engine import Engine
from dit_accel.pipelines import load
from dit_accel.pipelines.builtin import builtins
from dit_accel.pipelines.generate import call_arguments
from dit_accel.plan import AttentionPlan

PROMPT = "a green dragon flying left over the sea at night"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=[m.name for m in METHODS if not m.calibrated])
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 5, 8], help="of 10")
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    calls = [call for call in recorded(args) if call.layer in args.layers]
    exact = [probabilities(call) for call in calls]
    print(f"{len(calls)} calls of {calls[0].q.shape[1]} tokens; density asked {args.density}")
    print(f"{'method':<19}{'density':>8}{'mass':>7}{'error':>7}{'cosine':>8}{'later':>7}")
    table = {}
    for name in args.methods:
        try:
            figures = table[name] = judge(name, args.density, calls, exact)
        except (ValueError, RuntimeError) as error:
            print(f"{name:<19}{error}")
            continue
        print(f"{name:<19}" + "".join(f"{x:>{8 if n in (0, 3) else 7}.3f}" for n, x in enumerate(figures)), flush=True)
    if args.json:
        names = ("density", "mass", "error", "cosine", "later_mass")
        rows = {name: dict(zip(names, figures, strict=True)) for name, figures in table.items()}
        facts = {"prompt": args.prompt, "steps": args.steps, "layers": args.layers, "asked": args.density}
        args.json.write_text(json.dumps({"facts": facts, "methods": rows}, indent=1) + "\n")


def recorded(args: argparse.Namespace) -> list[AttentionCall]:
    """Calls with the prompt of some steps of a dense run, in the model's dtype, on the CPU."""
    settings = builtins()["embedded"].settings
    pipe = load("embedded")
    pipe.set_progress_bar_config(disable=True)
    found: list[AttentionCall] = []

    def keep(_: str, call: AttentionCall) -> None:
        if call.step.index in args.steps and call.step.branch != "uncond":
            q, k, v = (x.float().cpu() for x in (call.q, call.k, call.v))
            found.append(replace(call, q=q, k=k, v=v))

    arguments = call_arguments(pipe, **(vars(settings) | {"steps": 10}))
    with patch(pipe, "dense") as handle, handle.observe(keep):
        pipe(prompt=args.prompt, generator=torch.Generator().manual_seed(0), output_type="latent", **arguments)
    return found


def probabilities(call: AttentionCall) -> torch.Tensor:
    """Exact attention ``[H, S, S]`` of the first item, in half precision to save room."""
    q, k = (x[0].transpose(0, 1) for x in (call.q, call.k))
    return (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1).half()


def judge(name: str, density: float, calls: list[AttentionCall], exact: list[torch.Tensor]) -> list[float]:
    """Density, kept mass, relative error, cosine of queries to their block's mean, mass of the first mask later."""
    recipe = at_density(method(name), density, calls[:1])
    once = recipe.with_fields({"schedule": "schedule"})
    engine = Engine(once, [str(n) for n in range(1 + max(call.layer for call in calls))], "auto", 0)
    plans: list[AttentionPlan] = []
    engine.observer = lambda call: plans.append(call.plan)  # type: ignore[arg-type]
    sums = torch.zeros(5, dtype=torch.float64)
    first_plan: dict[int, AttentionPlan] = {}
    for call, prob in zip(calls, exact, strict=True):
        bare = replace(call.step, index=None)
        inputs = AttentionInputs(call.q, call.k, call.v)
        again = AttentionCall.of(call.layer, inputs, call.layout, bare, engine.run)
        out = engine.attend(again, lambda: call.q)  # noqa: B023
        plan = plans.pop()
        dense = (prob.float() @ call.v[0].transpose(0, 1)).transpose(0, 1)
        error = (out[0] - dense).norm() / dense.norm()
        earlier = first_plan.setdefault(call.layer, plan)
        figures = [0.0, mass(plan, prob), float(error), cosine(plan, call.q[0]), mass(earlier, prob)]
        sums += torch.tensor(figures, dtype=torch.float64)
    result = (sums / len(calls)).tolist()
    result[0] = float(sum(record.density_sum for record in engine.records)) / len(calls)
    last = max(call.step.index or 0 for call in calls)
    late = [mass(first_plan[c.layer], p) for c, p in zip(calls, exact, strict=True) if c.step.index == last]
    result[4] = sum(late) / len(late)
    return result


def mass(plan: AttentionPlan, prob: torch.Tensor) -> float:
    """Mean over queries and heads of the attention mass in the kept blocks; a pyramid's levels all count."""
    heads, length, _ = prob.shape
    keep = plan.mask.to_dense()[0].expand(heads, -1, -1)
    if isinstance(plan.compensation, torch.Tensor) and plan.compensation.dtype == torch.int8:
        keep = (plan.compensation[0] > 0).expand(heads, -1, -1)
    of_q, of_k = (
        (torch.arange(length) if rows is None else rows[0].long()).expand(heads, -1).argsort(-1)
        for rows in (plan.rows, plan.key_rows)
    )
    total = 0.0
    for h in range(heads):
        seen = keep[h][of_q[h] // plan.mask.block_q][:, of_k[h] // plan.mask.block_k]
        total += float((prob[h].float() * seen).sum(-1).mean())
    return total / heads


def cosine(plan: AttentionPlan, q: torch.Tensor) -> float:
    """Mean cosine of queries ``[S, H, D]`` to the mean query of their block."""
    queries = q.transpose(0, 1)
    if plan.rows is not None:
        rows = plan.rows[0].long().expand(queries.shape[0], -1)
        queries = queries.gather(1, rows[..., None].expand_as(queries))
    size = plan.mask.block_q
    blocks = queries[:, : queries.shape[1] // size * size].unflatten(1, (-1, size))
    return float(torch.cosine_similarity(blocks, blocks.mean(2, keepdim=True), dim=-1).mean())


if __name__ == "__main__":
    main()
