"""What every preset's forward takes at real sizes, against dense attention, eager and compiled; and its plans.

One transformer with random weights per size, of all layers or as many as memory and time allow: the first layer of a
forward waits for the host, which counts where there are few. Dense is timed once per size; the patched twin shares
the weights and changes its recipe between runs. For each preset: a forward that makes its plans, one that reuses
them, and from both the mean over a run of 30 steps with the preset's own schedule. The densities of presets without
a density of their own are fitted on recorded queries and keys.

Plan time is given as a share of the dense attention that the sparse steps of that run replace, every cost once: what
a layout needs once (orders, tables of grid rules, the plans of grid rules) is shared by all layers of the whole
model, not by the few timed here; a search is timed at its own step of the run, where the first one takes the
log-sum-exp from the step's attention and later ones have it; what that attention takes longer than the model's own
counts as planning. "order", "select" and "compensate" split the milliseconds of one planning forward. Methods whose
plans are made offline have none to make; here their heads take the six axis orders in turn.

    python benchmarks/presets_speed.py --seconds 550 --out presets_speed.json
    python benchmarks/presets_speed.py --sizes wan2.1-1.3b:832x480x81:4 --methods pooled adaspa --out some.json

    python benchmarks/presets_speed.py --sizes wan2.1-1.3b:832x480x81:30 wan2.1-1.3b:1280x720x81:3 --out first.json &
    CUDA_VISIBLE_DEVICES=1 python benchmarks/presets_speed.py --sizes hunyuanvideo:1280x720x129:2 --out second.json

A size is ARCHITECTURE:WIDTHxHEIGHTxFRAMES:LAYERS. Figures are those of the layers timed, not of the whole model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fidelity_presets import METHODS, at_density, method

from dit_accel import Recipe, patch
from dit_accel.benchmarking.forward import (
    Variant,
    compiled_blocks,
    dense_attention,
    fastest_dense_backend,
    restored_dense_backend,
    share_weights,
)
from dit_accel.calibration.search import with_orders
from dit_accel.call import AttentionCall
from dit_accel.cli.environment import environment
from dit_accel.engine import Engine
from dit_accel.layout import StepContext
from dit_accel.pipelines.architectures import architecture
from dit_accel.run import Run
from dit_accel.stages.order.axes import AXIS_ORDERS, ChosenAxes

SIZES = ("wan2.1-1.3b:832x480x81:30", "wan2.1-1.3b:1280x720x81:3", "hunyuanvideo:1280x720x129:2")
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
        # One of each layer: a threshold that gives the density in one may give another in the next.
        calls: list[AttentionCall] = []

        def keep(_: str, call: AttentionCall) -> None:
            if len(calls) < int(layers):
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
            f"{'method':<13}{'density':>8}{'reuse ms':>10}{'x':>7}{'plan ms':>9}{'run x':>7}{'plan/attn':>10}"
            f"{'order':>9}{'select':>8}{'compensate':>12}{'once ms':>9}",
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
                if isinstance(recipes[label].order, ChosenAxes):
                    recipes[label] = with_orders_in_turn(recipes[label], calls[0].q.shape[2])
                row |= time_recipe(
                    recipes[label], session, names, patched, size, args.repeats, method(label).calibrated
                )
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
        save()
        print(f"compiled: dense {size['dense_compiled_s'] * 1e3:.1f} ms", flush=True)
        size["compiled"] = []
        for label in args.compiled:
            if label not in recipes or time.perf_counter() > args.end:
                continue
            row = {"method": label}
            row |= time_recipe(
                recipes[label],
                session,
                names,
                patched,
                size,
                args.repeats,
                method(label).calibrated,
                "dense_compiled_s",
            )
            size["compiled"].append(row)
            print_row(row)
            save()


def with_orders_in_turn(recipe: Recipe, heads: int) -> Recipe:
    """PARO's recipe as a calibration leaves it: an axis order for every head."""
    return with_orders(recipe, (tuple(AXIS_ORDERS[head % len(AXIS_ORDERS)] for head in range(heads)),))


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
    offline: bool,
    dense_key: str = "dense_s",
) -> dict[str, Any]:
    """Forwards with and without planning, and what a run of 30 steps comes to."""
    kinds = _run(recipe)
    found = timed_searches if "search" in kinds and not offline else timed_plans
    cost = found(recipe, session, names, patched, size, repeats)
    if offline:
        cost |= {"plan_s": 0.0, "once_per_layout_s": 0.0, "planning_forward_s": cost["reusing_forward_s"]}
    engine, dense_s = session.engine, size[dense_key]
    # Of what all layers share, those timed here have their part of the whole model.
    layers, blocks = (int(n) for n in size["layers"].split(" of "))
    part = layers / blocks
    planned, reused, dense = (kinds.count(kind) for kind in ("plan", "reuse", "dense"))
    each = cost["plan_s"] * (part if recipe.select.is_static else 1.0)
    spent = cost["once_per_layout_s"] * part + planned * each + cost["searches_s"]
    fresh = cost["planning_forward_s"] - cost["plan_s"] + each
    run = cost["once_per_layout_s"] * part + planned * fresh + reused * cost["reusing_forward_s"]
    run = (run + dense * dense_s + cost["search_forwards_s"]) / STEPS
    replaced = (planned + reused) * size["dense_attention_s"]
    sparse = sum(record.sparse_calls for record in engine.records)
    return {
        "recipe": recipe.to_dict(),
        "density": float(sum(record.density_sum for record in engine.records)) / max(sparse, 1),
        **cost,
        "speedup_reusing": dense_s / cost["reusing_forward_s"],
        "speedup_planning": dense_s / cost["planning_forward_s"],
        "steps_of_30": {kind: kinds.count(kind) for kind in ("plan", "search", "reuse", "dense")},
        "speedup_run_of_30": dense_s / run,
        "plan_share_of_replaced_attention": spent / max(replaced, 1e-9),
        "sparse_attention_s": engine.sparse_time.seconds() / (sparse / len(names)) if sparse else None,
        "backends": engine.backends_used.to_dict(),
    }


def timed_plans(
    recipe: Recipe, session: Any, names: Sequence[str], patched: Variant, _size: dict[str, Any], repeats: int
) -> dict[str, Any]:
    """Costs of a recipe whose plans are made in sparse steps."""
    # A bare transformer has no steps: plans are kept until they are forgotten here.
    # A drift guard measures at every forward, and never finds these inputs moved: its cost shows in the reuse.
    kept = {"schedule.refresh_every": 10**6, "schedule.refresh_at": (), "schedule.dense_refresh": False}
    engine, trajectory = Engine(recipe.with_fields(kept), list(names), "auto", 0), Trajectory.of(session)
    session.engine, trajectory.run = engine, Run()
    patched.run()
    patched.run()
    # Orders, tables and the plans of grid rules are made once a layout, other plans as often as the schedule says.
    before = engine.plan_time.seconds()
    engine.planner.forget()
    trajectory.run = Run()
    patched.run()
    once = engine.plan_time.seconds() - before
    plan, fresh = [], []
    parts = parts_of(engine)
    for _ in range(repeats):
        trajectory.run = Run()
        before = engine.plan_time.seconds()
        fresh.append(timed(patched, 1, warm=0))
        plan.append(engine.plan_time.seconds() - before)
    parts = {name: (value - parts[name]) / repeats for name, value in parts_of(engine).items()}
    return {
        "plan_s": statistics.median(plan),
        "plan_parts_s": parts,
        "once_per_layout_s": max(once - statistics.median(plan), 0.0),
        "searches_s": 0.0,
        "search_forwards_s": 0.0,
        "planning_forward_s": statistics.median(fresh),
        "reusing_forward_s": timed(patched, repeats, warm=0),
    }


def timed_searches(
    recipe: Recipe, session: Any, names: Sequence[str], patched: Variant, size: dict[str, Any], repeats: int
) -> dict[str, Any]:
    """Costs of a recipe that plans in dense steps, each search at its step of the run."""
    engine, trajectory = Engine(recipe, list(names), "auto", 0), Trajectory.of(session)
    session.engine = engine
    kinds = _run(recipe)
    searches = [index for index, kind in enumerate(kinds) if kind == "search"]
    plan: dict[int, list[float]] = {index: [] for index in searches}
    forward: dict[int, list[float]] = {index: [] for index in searches}
    reuse = []
    parts: dict[str, float] = {}
    for repeat in range(repeats + 1):
        trajectory.run = Run()
        if repeat == 1:
            parts = parts_of(engine)
        for index in searches:
            with trajectory.at_step(index):
                before, dense_before = engine.plan_time.seconds(), engine.dense_time.seconds()
                forward[index].append(timed(patched, 1, warm=0))
                extra = engine.dense_time.seconds() - dense_before - size["dense_attention_s"]
                plan[index].append(engine.plan_time.seconds() - before + max(extra, 0.0))
            if index + 1 < STEPS and kinds[index + 1] == "reuse":
                with trajectory.at_step(index + 1):
                    reuse.append(timed(patched, 1, warm=0))
    parts = {name: (value - parts[name]) / repeats / len(searches) for name, value in parts_of(engine).items()}
    # The first round compiles.
    each = {index: statistics.median(seconds[1:]) for index, seconds in plan.items()}
    whole = {index: statistics.median(seconds[1:]) for index, seconds in forward.items()}
    return {
        "plan_s": sum(each.values()) / len(each),
        "plan_parts_s": parts,
        "once_per_layout_s": 0.0,  # raster order: nothing
        "searches_s": sum(each.values()),
        "each_search_s": list(each.values()),
        "search_forwards_s": sum(whole.values()),
        "planning_forward_s": sum(whole.values()) / len(whole),
        "reusing_forward_s": statistics.median(reuse[len(searches) :]),
    }


class Trajectory:
    """In place of what a session reads off a pipeline: the benchmark says at which step of which run a forward is.

    Attributes:
        run: keeps the plans; another one knows none of them.
        index: of the step, of 30; None for a bare transformer, which has no steps.
    """

    def __init__(self) -> None:
        self.run = Run()
        self.index: int | None = None

    def next_forward(
        self, forward_id: int, name: str | None, _timestep: torch.Tensor | None
    ) -> tuple[Run, StepContext, str | None]:
        """What a session asks when a forward begins."""
        steps = None if self.index is None else STEPS
        return self.run, StepContext(self.index, steps, None, name, forward_id), None

    @contextmanager
    def at_step(self, index: int) -> Iterator[None]:
        """Forwards are at this step meanwhile."""
        self.index = index
        try:
            yield
        finally:
            self.index = None

    @classmethod
    def of(cls, session: Any) -> Trajectory:
        """The session's, put in place of its own reading if that is still there."""
        if not isinstance(session._thread.runs, cls):
            session._thread.runs = cls()
        found: Trajectory = session._thread.runs
        return found


def parts_of(engine: Engine) -> dict[str, float]:
    """Seconds of planning so far, by part."""
    return {name: watch.seconds() for name, watch in engine.planner.parts.items()}


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


def print_row(row: dict[str, Any]) -> None:
    reuse = row["reusing_forward_s"] * 1e3
    parts = {name: seconds * 1e3 for name, seconds in row["plan_parts_s"].items()}
    print(
        f"{row['method']:<13}{row['density']:>8.3f}{reuse:>10.1f}{row['speedup_reusing']:>7.2f}"
        f"{row['plan_s'] * 1e3:>9.2f}{row['speedup_run_of_30']:>7.2f}{row['plan_share_of_replaced_attention']:>10.3f}"
        f"{parts['order']:>9.2f}{parts['select']:>8.2f}{parts['compensate']:>12.2f}"
        f"{row['once_per_layout_s'] * 1e3:>9.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
