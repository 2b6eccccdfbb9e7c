"""What every preset's forward takes at real sizes, against dense attention, eager and compiled; and its plans.

One transformer with random weights and few layers per size. Dense is timed once per size; the patched twin shares
the weights and changes its recipe between runs. For each preset: a forward that makes its plans (all caches empty),
one that reuses them, and from both the mean over a run of 30 steps with the preset's own schedule. Plan time is
given as a share of the dense attention that the sparse steps of that run replace. The densities of presets
without a density of their own are fitted on recorded queries and keys.

    python benchmarks/presets_speed.py --seconds 250 --out presets_speed.json
    python benchmarks/presets_speed.py --sizes wan2.1-1.3b:832x480x81:4 --methods pooled adaspa --out some.json

A size is ARCHITECTURE:WIDTHxHEIGHTxFRAMES:LAYERS. Figures are those of the layers timed, not of the whole model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fidelity_presets import METHODS, at_density, method

from dit_accel import Recipe, patch
from dit_accel.cli.environment import environment
from dit_accel.cli.forward_bench import (
    Variant,
    compiled_blocks,
    dense_attention,
    fastest_dense_backend,
    restored_dense_backend,
    share_weights,
)
from dit_accel.engine import AttentionCall, Engine
from dit_accel.layout import StepContext
from dit_accel.pipelines.architectures import architecture

SIZES = ("wan2.1-1.3b:832x480x81:4", "wan2.1-1.3b:1280x720x81:3", "hunyuanvideo:1280x720x129:2")
STEPS = 30
# Where dense is the only other choice these show nothing, and those that differ in schedule alone repeat others.
LEFT_OUT = ("adaspa-2", "ssa", "sla")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--methods", nargs="+", default=[m.name for m in METHODS if m.name not in LEFT_OUT])
    parser.add_argument("--compiled", nargs="*", default=["pooled", "adaspa"], help="methods to time compiled too")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no method after this time")
    parser.add_argument("--dense-backend", help="diffusers' name; default: the fastest that runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--compiler", default="inductor")
    parser.add_argument("--out", type=Path, default=Path("presets_speed.json"))
    args = parser.parse_args()
    args.end = time.perf_counter() + args.seconds
    result: dict[str, Any] = {**environment(torch.device(args.device)), "density": args.density, "sizes": []}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for text in args.sizes:
        size: dict[str, Any] = {"size": text}
        result["sizes"].append(size)
        try:
            time_size(text, args, size, lambda: args.out.write_text(json.dumps(result, indent=1) + "\n"))
        except Exception as error:  # the next size goes on
            size["error"] = f"{type(error).__name__}: {error}"
            size["traceback"] = traceback.format_exc()[-2000:]
            print(size["error"], flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        args.out.write_text(json.dumps(result, indent=1) + "\n")


@torch.no_grad()
def time_size(text: str, args: argparse.Namespace, size: dict[str, Any], save: Any) -> None:
    """Fill in one size's figures; ``save`` is called after each method."""
    name, pixels, layers = text.split(":")
    width, height, frames = (int(n) for n in pixels.split("x"))
    known = architecture(name)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    shape = {"width": width, "height": height, "frames": frames, "batch": 1}
    size["latent_tokens"] = known.tokens(width, height, frames)
    size["layers"] = f"{layers} of {known.blocks}"
    with ExitStack() as stack:
        stack.enter_context(restored_dense_backend())
        backend, size["dense_candidates"] = args.dense_backend, {}
        if backend is None:
            backend, size["dense_candidates"] = fastest_dense_backend(known, shape, dtype, device)
        size["dense_backend"] = backend
        model = known.build(dtype=dtype, device=device, layers=int(layers))
        inputs = known.make_inputs(model, **shape, dtype=dtype, device=device)
        stack.enter_context(dense_attention(model, backend))
        twin = share_weights(model)
        handle = stack.enter_context(patch(twin, "dense"))
        dense, patched = Variant(model, inputs), Variant(twin, inputs)
        calls: list[AttentionCall] = []

        def keep(_: str, call: AttentionCall) -> None:
            if not calls:
                calls.append(replace(call, q=call.q.clone(), k=call.k.clone(), v=call.v.clone()))

        with handle.observe(keep):
            patched.run()
        size["dense_s"] = timed(dense, args.repeats, warm=1)
        before = handle.summary().dense_seconds
        timed(patched, args.repeats, warm=0)
        size["dense_attention_s"] = (handle.summary().dense_seconds - before) / args.repeats
        print(
            f"\n{text}: {size['latent_tokens']} tokens, {size['layers']} layers, dense {size['dense_s'] * 1e3:.1f} ms "
            f"({backend}), attention {size['dense_attention_s'] * 1e3:.1f} ms",
            flush=True,
        )
        session = next(iter(handle.sessions.values()))
        names = [record.name for record in session.engine.records]
        rows: list[dict[str, Any]] = []
        size["methods"] = rows
        recipes: dict[str, Recipe] = {}
        print(
            f"{'method':<13}{'density':>8}{'reuse ms':>10}{'x':>7}{'plan ms':>9}{'run x':>7}{'plan/attn':>10}",
            flush=True,
        )
        for label in args.methods:
            row: dict[str, Any] = {"method": label}
            rows.append(row)
            if time.perf_counter() > args.end:
                row["error"] = "no time left"
                continue
            try:
                recipes[label] = at_density(method(label), args.density, calls)
                row |= time_recipe(recipes[label], session, names, patched, size, args.repeats)
                print_row(row)
            except Exception as error:  # the next method goes on
                row["error"] = f"{type(error).__name__}: {error}"
                row["traceback"] = traceback.format_exc()[-2000:]
                print(f"{label:<13}{row['error'][:90]}", flush=True)
            save()
        calls.clear()
        if not args.compiled or time.perf_counter() > args.end:
            return
        stack.enter_context(compiled_blocks(model, twin, args.compiler))
        size["dense_compiled_s"] = timed(dense, args.repeats, warm=2)
        print(f"compiled: dense {size['dense_compiled_s'] * 1e3:.1f} ms", flush=True)
        size["compiled"] = []
        for label in args.compiled:
            if label not in recipes or time.perf_counter() > args.end:
                continue
            row = {"method": label}
            row |= time_recipe(recipes[label], session, names, patched, size, args.repeats, "dense_compiled_s")
            size["compiled"].append(row)
            print_row(row)
            save()


def timed(variant: Variant, repeats: int, warm: int) -> float:
    """Median seconds of a forward."""
    for _ in range(warm):
        variant.run()
    variant.seconds.clear()
    for _ in range(repeats):
        variant.run()
    return statistics.median(variant.seconds)


def time_recipe(
    recipe: Recipe,
    session: Any,
    names: Sequence[str],
    patched: Variant,
    size: dict[str, Any],
    repeats: int,
    dense_key: str = "dense_s",
) -> dict[str, Any]:
    """Forwards with and without planning, and what a run of 30 steps comes to."""
    # A bare transformer has no steps: plans are kept until they are forgotten here.
    # A drift guard measures at every forward, and never finds these inputs moved: its cost shows in the reuse.
    kept = {"schedule.refresh_every": 10**6, "schedule.refresh_at": (), "schedule.dense_refresh": False}
    engine = Engine(recipe.with_fields(kept), list(names), "auto", 0)
    session.engine = engine
    patched.run()
    engine.forget()
    patched.run()
    # Orders and tables of the grid are made once a layout, plans as often as the schedule says.
    before = engine.plan_time.seconds()
    engine.forget()
    patched.run()
    once = engine.plan_time.seconds() - before
    plan, fresh = [], []
    for _ in range(repeats):
        engine.forget_plans()
        before = engine.plan_time.seconds()
        fresh.append(timed(patched, 1, warm=0))
        plan.append(engine.plan_time.seconds() - before)
    reuse = timed(patched, repeats, warm=0)
    sparse = sum(record.sparse_calls for record in engine.records)
    density = float(sum(record.density_sum for record in engine.records)) / max(sparse, 1)
    planned, reused, dense = steps_of_a_run(recipe)
    dense_s = size[dense_key]
    per_plan = statistics.median(plan)
    first = max(once - per_plan, 0.0)
    plans = planned + dense_searches(recipe)
    spent = first + plans * per_plan
    run = (first + planned * statistics.median(fresh) + reused * reuse + dense * dense_s) / STEPS
    run += dense_searches(recipe) * per_plan / STEPS
    share = spent / max((planned + reused) * size["dense_attention_s"], 1e-9)
    return {
        "recipe": recipe.to_dict(),
        "density": density,
        "planning_forward_s": statistics.median(fresh),
        "reusing_forward_s": reuse,
        "speedup_reusing": dense_s / reuse,
        "speedup_planning": dense_s / statistics.median(fresh),
        "plan_s": per_plan,
        "once_per_layout_s": first,
        "steps_of_30": {"plan": planned, "reuse": reused, "dense": dense},
        "speedup_run_of_30": dense_s / run,
        "plan_share_of_replaced_attention": share,
        "sparse_attention_s": engine.sparse_time.seconds() / (sparse / len(names)) if sparse else None,
        "backends": dict(engine.backends_used),
    }


def _run(recipe: Recipe) -> list[str]:
    """What each step of a run does with its plan: "dense", "search" (dense, and plans), "plan" or "reuse"."""
    made: StepContext | None = None
    kinds = []
    for index in range(STEPS):
        step = StepContext(index=index, num_steps=STEPS, forward_id=index)
        if recipe.schedule.dense_reason(step, 0, 10**6) is not None:
            kinds.append("dense")
        elif made is None or (not recipe.select.is_static and recipe.schedule.needs_plan(step, made)):
            made = step
            kinds.append("search" if recipe.schedule.dense_refresh else "plan")
        else:
            kinds.append("reuse")
    return kinds


def steps_of_a_run(recipe: Recipe) -> tuple[int, int, int]:
    """Sparse steps that plan, sparse steps that reuse, and dense steps, of 30."""
    kinds = _run(recipe)
    return kinds.count("plan"), kinds.count("reuse"), kinds.count("dense") + kinds.count("search")


def dense_searches(recipe: Recipe) -> int:
    """Plans that are made in a dense step."""
    return _run(recipe).count("search")


def print_row(row: dict[str, Any]) -> None:
    reuse = row["reusing_forward_s"] * 1e3
    print(
        f"{row['method']:<13}{row['density']:>8.3f}{reuse:>10.1f}{row['speedup_reusing']:>7.2f}"
        f"{row['plan_s'] * 1e3:>9.2f}{row['speedup_run_of_30']:>7.2f}{row['plan_share_of_replaced_attention']:>10.3f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
