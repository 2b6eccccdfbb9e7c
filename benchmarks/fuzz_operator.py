"""Random calls of ``block_sparse_attention`` on every backend, forward and backward, against float64.

    python -m benchmarks.fuzz_operator [--count 10000] [--seconds 240] [--json out.json]

Lengths of 1 to 3,000, all blocks and head dims that compile in reasonable time, permutations, token bits, key masks
that may hide everything, rows without a block, strided and expanded inputs, outliers. Every number is compared with a
bound that is derived for it (``fuzz_bounds.py``). Memory that outputs are given is filled with NaN first, keys that no
block lists hold NaN in every other call, and some calls are made twice and must have the same bits.

Each shape has six sizes, compiled ahead: a size that nobody has seen costs a second.

A call depends on ``--seed`` and its number alone: go on with ``--first``, look at one with ``--first N --count 1``.
Another seed has other shapes, which are compiled anew, in worker processes. Without a GPU the same runs on the CPU.
The exit code is 1 if any call is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dit_accel.cli.environment import environment
from dit_accel.files import refuse_unwritable, write_text
from dit_accel.kernels import BACKENDS, block_sparse_attention, choose_backend

from .fuzz_bounds import expected, of_seen
from .fuzz_calls import SIZES, Call, Shape, draw, shapes

NAMES = ("out", "lse", "dq", "dk", "dv")
BATCH = 64  # calls between two waits for the device
# How often a backend is taken, of all calls.
SHARES = {"auto": 8, "triton": 1, "torch": 1, "reference": 1, "fa4": 1}


@dataclass
class Tally:
    """Calls of one dtype and kernel, how many were wrong, and the largest errors as shares of what is allowed."""

    calls: int = 0
    wrong: int = 0
    largest: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 0.0))


def run(call: Call, backend: str) -> dict[str, torch.Tensor]:
    """What the operator gives, by name; with gradients where the call has some."""
    inputs = [call.q, call.k, call.v]
    if (
        call.number % 2
        and backend != "reference"
        and call.shape.layout not in ("heads alike", "batch alike", "shifted")
    ):
        # Their blocks must not be read; the reference multiplies them by 0.
        gone = call.unread.transpose(1, 2)[..., None]
        inputs[1:] = [_with_strides_of(x, x.masked_fill(gone, torch.nan)) for x in inputs[1:]]
    inputs = [x.detach().requires_grad_(call.grad is not None) for x in inputs]
    # Freed memory of the outputs' sizes, so that what nobody writes shows.
    poison = [torch.full(x.shape, torch.nan, dtype=x.dtype, device=x.device) for x in inputs * 2]
    poison.append(torch.full(call.unread.shape, torch.nan, device=call.q.device))
    del poison
    out, lse = block_sparse_attention(
        *inputs,
        call.mask,
        rows=call.rows,
        key_mask=call.key_mask,
        scale=call.scale,
        return_lse=True,
        backend=backend,
    )
    found = {"out": out.detach(), "lse": lse.detach()}
    if call.grad is not None:
        grads = torch.autograd.grad((out, lse), inputs, (call.grad, of_seen(call.grad_lse, lse)))
        found.update(zip(("dq", "dk", "dv"), grads))
    return found


def _with_strides_of(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """``values`` laid out as ``x`` is."""
    whole = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return whole.copy_(values)


def errors(call: Call, backend: str, kernel: str, twice: bool) -> torch.Tensor:
    """The largest error of each of :data:`NAMES` as a share of what is allowed, float64 ``[5]`` on the device.

    Above 1 is wrong; infinite is a NaN, a row that sees nothing and is not 0, or other bits when the call is repeated.
    """
    found = run(call, backend)
    want = expected(call, kernel)
    shares = torch.zeros(len(NAMES), dtype=torch.float64, device=call.q.device)
    nothing = ~want.exact["lse"].isfinite()
    for n, name in enumerate(NAMES):
        if name in found:
            actual, exact = found[name].double(), want.exact[name]
            share = (actual - exact).abs() / want.allowed[name].clamp_min(1e-300)
            if name == "lse":
                share = torch.where(nothing, torch.where(actual == -torch.inf, 0.0, torch.inf), share)
            elif name in ("out", "dq"):
                hidden = nothing.transpose(1, 2)[..., None]
                share = torch.where(hidden, torch.where(actual == 0, 0.0, torch.inf), share)
            # float16 may not hold it.
            beyond = exact.abs() > torch.finfo(found[name].dtype).max - want.allowed[name]
            shares[n] = share.masked_fill(beyond & exact.isfinite(), 0.0).nan_to_num(torch.inf, torch.inf).max()
    if twice:
        with torch.no_grad():
            again = run(replace(call, grad=None), backend)
        for n, name in enumerate(("out", "lse")):
            shares[n] += torch.where((again[name] == found[name]).all(), 0.0, torch.inf)
    return shares


def backend_of(call: Call, asked: list[str]) -> tuple[str, str]:
    """The backend of a call, and the kernel that it runs there."""
    name = random.Random(call.number).choices(asked, [SHARES[name] for name in asked])[0]
    try:
        chosen, reason = choose_backend(
            call.q, call.k, call.v, call.mask, rows=call.rows, key_mask=call.key_mask, backend=name
        )
    except ValueError:
        name = "auto"
        chosen, reason = choose_backend(call.q, call.k, call.v, call.mask, rows=call.rows, key_mask=call.key_mask)
    if chosen == "triton":
        chosen = "portable" if "portable kernel" in reason else "hopper"
    return name, chosen


def warm_up(seed: int, number: int, shape: Shape, longest: int, asked: list[str]) -> str | None:
    """In a worker: compile a shape's kernels into Triton's cache on disk. What went wrong, or None."""
    try:
        for size in range(SIZES):
            call = draw(seed, -1 - SIZES * number - size, shape, size, torch.device("cuda"), longest)
            run(call, next((name for name in asked if name in ("auto", "triton")), asked[0]))
        torch.cuda.synchronize()
    except Exception as error:  # the call itself will show it too, in the process that counts
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def compile_all(args: argparse.Namespace, used: dict[int, Shape], asked: list[str]) -> None:
    """Compile the shapes of the coming calls in worker processes."""
    start, context = time.perf_counter(), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        # What takes longest first.
        order = sorted(used, key=lambda n: (used[n].gradients, used[n].dtype == torch.float32), reverse=True)
        work = {pool.submit(warm_up, args.seed, n, used[n], args.longest, asked): n for n in order}
        for done in as_completed(work):
            # A worker that died takes the pool with it; what is left is compiled in turn.
            problem = done.result() if done.exception() is None else repr(done.exception())
            if problem is not None:
                print(f"while compiling {used[work[done]]}: {problem}", file=sys.stderr)
    print(f"compiled {len(used)} shapes in {time.perf_counter() - start:.0f} s", file=sys.stderr)


def fuzz(args: argparse.Namespace, asked: list[str]) -> tuple[dict[tuple[str, str], Tally], list[dict[str, Any]], int]:
    """Tallies by dtype and kernel, the wrong calls, and the number of the next call."""
    begin, device = time.perf_counter(), torch.device(args.device)
    every = shapes(args.seed)
    dtypes = args.dtypes.split(",")
    numbers = [
        number
        for number in range(args.first, args.first + args.count)
        if str(every[number % len(every)].dtype)[6:] in dtypes
    ]
    if device.type == "cuda" and args.workers and len(numbers) >= BATCH:
        compile_all(args, {n % len(every): every[n % len(every)] for n in numbers[: len(every)]}, asked)
    tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)
    failures: list[dict[str, Any]] = []
    waiting: list[tuple[int, tuple[str, str], str, torch.Tensor]] = []
    said: Counter[str] = Counter()

    def judge() -> None:
        found = torch.stack([shares for *_, shares in waiting]).tolist() if waiting else []
        for (number, place, text, _), shares in zip(waiting, found, strict=True):
            tally = tallies[place]
            tally.calls += 1
            tally.largest = {name: max(tally.largest[name], share) for name, share in zip(NAMES, shares)}
            if max(shares) > 1:
                over = ", ".join(f"{name} {share:.3g}" for name, share in zip(NAMES, shares) if share > 1)
                fail(number, place, text, f"times what is allowed: {over}")
        waiting.clear()

    def fail(number: int, place: tuple[str, str], text: str, problem: str) -> None:
        tallies[place].wrong += 1
        failures.append({"number": number, "kernel": place[1], "call": text, "problem": problem})
        said[problem] += 1
        if said[problem] <= 3:
            print(f"--seed {args.seed} --first {number} --count 1, {place[1]}: {text}\n    {problem}", flush=True)

    for number in numbers:
        if args.seconds is not None and time.perf_counter() - begin > args.seconds:
            judge()
            return tallies, failures, number
        shape, size = every[number % len(every)], number // len(every) % SIZES
        call = draw(args.seed, number, shape, size, device, args.longest)
        backend, kernel = backend_of(call, asked)
        place = (str(call.shape.dtype)[6:], kernel)
        try:
            # Nothing waits for the device, and little is kept until something does.
            waiting.append((number, place, call.describe(), errors(call, backend, kernel, twice=number % 8 == 0)))
            if len(waiting) == BATCH:
                judge()
        except Exception as error:  # whatever it is, the call should have run
            fail(number, place, call.describe(), f"{type(error).__name__}: {str(error).splitlines()[0]}")
            if "CUDA error" in str(error):
                print(f"The device is lost; any of the {len(waiting) + 1} last calls may be to blame.", flush=True)
                return tallies, failures, number
    judge()
    return tallies, failures, args.first + args.count


def table(tallies: dict[tuple[str, str], Tally]) -> str:
    """A line for every dtype and kernel."""
    lines = [f"{'dtype':10}{'kernel':11}{'calls':>7}{'wrong':>7}   largest errors, as shares of what is allowed"]
    for (dtype, kernel), tally in sorted(tallies.items()):
        shares = "  ".join(f"{name} {share:.2f}" for name, share in tally.largest.items() if share)
        lines.append(f"{dtype:10}{kernel:11}{tally.calls:7}{tally.wrong:7}   {shares}")
    return "\n".join(lines)


def read_arguments(given: list[str] | None = None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="stop after so long, compilation included")
    parser.add_argument("--longest", type=int, default=3000 if on_gpu else 300, help="tokens")
    parser.add_argument("--backends", default="auto,triton,torch,reference,fa4" if on_gpu else "torch,reference")
    parser.add_argument("--dtypes", default="float32,float16,bfloat16", help="calls in others are skipped")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="that compile; 0 compiles in turn")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(given)
    unknown = set(args.backends.split(",")) - set(BACKENDS)
    if unknown:
        parser.error(f"--backends must be of {', '.join(BACKENDS)}, got {', '.join(sorted(unknown))}.")
    if min(args.count, args.longest) < 1 or args.first < 0:
        parser.error("--count and --longest must be at least 1, --first at least 0.")
    wrong = set(args.dtypes.split(",")) - {"float32", "float16", "bfloat16"}
    if wrong:
        parser.error(f"--dtypes must be of float32, float16, bfloat16, got {', '.join(sorted(wrong))}.")
    return args


def main(given: list[str] | None = None) -> int:
    args = read_arguments(given)
    if args.json is not None:
        refuse_unwritable(args.json)
    start = time.perf_counter()
    tallies, failures, following = fuzz(args, args.backends.split(","))
    seconds = time.perf_counter() - start
    print(table(tallies))
    rest = f"; go on with --first {following}" if following < args.first + args.count else ""
    print(f"numbers {args.first} to {following - 1}: {len(failures)} wrong, {seconds:.0f} s{rest}")
    if args.json is not None:
        record = {
            "environment": environment(torch.device(args.device)),
            "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
            "seconds": round(seconds, 1),
            "tallies": [
                {"dtype": dtype, "kernel": kernel, "calls": tally.calls, "wrong": tally.wrong, **_finite(tally.largest)}
                for (dtype, kernel), tally in sorted(tallies.items())
            ],
            "failures": failures,
        }
        write_text(args.json, json.dumps(record, indent=1) + "\n")
    return int(bool(failures))


def _finite(shares: dict[str, float]) -> dict[str, float | None]:
    """JSON has no infinity."""
    return {name: round(share, 4) if math.isfinite(share) else None for name, share in shares.items()}


if __name__ == "__main__":
    sys.exit(main())
