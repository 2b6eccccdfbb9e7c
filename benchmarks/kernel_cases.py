"""Masks, checks and anchors that the kernel benchmarks share."""

from __future__ import annotations

import contextlib
import math
import os
import random
import statistics
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
from captured_calls import Captured, captured
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.kernels import BlockMask
from dit_accel.kernels.attention import tune

BLOCKS = ((128, 128), (128, 64), (64, 64))
DENSITIES = (0.05, 0.1, 0.2)
# A row's times; what derives from each begins so.
PREFIXES = {"ms": "", "device_ms": "device_", "load_ms": "load_", "alone_ms": "alone_"}

# Continuous load: how long until the clock has fallen, how long is counted, and the bounds of the rounds in that time.
WARM_UP_MS, COUNTED_MS, MIN_ROUNDS, MAX_ROUNDS = 300, 450, 8, 500
ENQUEUE_MS = 0.02  # what the host needs for a graph and its events, about

DRY = os.environ.get("KERNELS_DRY") == "1"  # run everything once, untimed, to fill the compilers' caches


def median_ms(function: Callable[[], object], rep: int = 60) -> float:
    if DRY:
        function()
        return math.nan
    return triton.testing.do_bench(function, warmup=20, rep=rep, return_mode="median")


def device_ms(function: Callable[[], object]) -> float:
    """Milliseconds of a replayed CUDA graph: no gaps between launches, as in a model that keeps the GPU busy."""
    if DRY:
        function()
        return math.nan
    replay = captured(function)
    return statistics.median(replay_ms(replay) for _ in range(3))


def replay_ms(graph: Captured[object], budget_ms: float = 25) -> float:
    """Mean milliseconds of replays one after the other, for about ``budget_ms``."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    count = 1
    for _ in range(2):  # one replay, to know how many fit; then those
        start.record()
        for _ in range(count):
            graph.replay()
        end.record()
        end.synchronize()
        ms = start.elapsed_time(end) / count
        count = max(2, min(200, int(budget_ms / ms)))
    return ms


def load_ms(
    launches: dict[str, Callable[[], object]], expected_ms: dict[str, float], seed: int = 0
) -> dict[str, float]:
    """Median milliseconds of calls in random order, the GPU busy all the time and thus at its power.

    A call is a few per cent faster behind one that draws less power, so every round is shuffled anew. Nothing waits
    before the end, and no cache is cleared.

    Args:
        launches: enqueue a call, at best as one graph.
        expected_ms: what each takes, about, to know how many rounds fit.

    Returns:
        A time for every name; NaN where the GPU waited for the host in half of the rounds or more.
    """
    round_ms = sum(max(expected_ms[name], ENQUEUE_MS) for name in launches)
    warm_up = math.ceil(WARM_UP_MS / round_ms)
    rounds = min(max(int(COUNTED_MS / round_ms), MIN_ROUNDS), MAX_ROUNDS)
    order, shuffle = list(launches), random.Random(seed).shuffle
    spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in launches}
    previous: torch.cuda.Event | None = None
    for number in range(warm_up + rounds):
        shuffle(order)
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            launches[name]()
            end.record()
            # Where the call before has ended by now, the GPU has waited for the host: that time is not the kernel's.
            late = previous is not None and previous.query()
            if number >= warm_up and not late:
                spans[name].append((start, end))
            previous = end
    torch.cuda.synchronize()
    times = {name: [start.elapsed_time(end) for start, end in found] for name, found in spans.items()}
    return {name: statistics.median(ms) if 2 * len(ms) > rounds else math.nan for name, ms in times.items()}


def in_turns(
    calls: dict[str, Callable[[], object]], alone: Collection[str] = (), rounds: int = 3
) -> dict[str, dict[str, float]]:
    """Three times of every call, medians, and of those in ``alone`` a fourth.

    ``ms``: called, L2 cache cleared, with rests between. ``device_ms``: its graph replayed, one replay after the other;
    NaN without a graph. ``load_ms``: all of them in random order under load, graphs where there are. ``alone_ms``: one
    of them over and over under load.

    Every round times all of them, so that a clock that falls under load falls for all alike.
    """
    if DRY or not calls:
        for call in calls.values():
            call()
        keys = {name: [key for key in PREFIXES if key != "alone_ms" or name in alone] for name in calls}
        return {name: dict.fromkeys(keys[name], math.nan) for name in calls}
    graphs = {}
    for name, call in calls.items():
        with contextlib.suppress(RuntimeError):  # what cannot be captured has no device time
            graphs[name] = captured(call)
    plain: dict[str, list[float]] = {name: [] for name in calls}
    device: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(rounds):
            for name, call in calls.items():
                plain[name].append(triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median"))
        for _ in range(rounds):
            for name, graph in graphs.items():
                device[name].append(replay_ms(graph))
        launches = {name: graphs[name].replay if name in graphs else call for name, call in calls.items()}
        expected = {name: statistics.median(device[name] or plain[name]) for name in calls}
        loaded = load_ms(launches, expected)
        by_itself = {name: load_ms({name: launches[name]}, expected)[name] for name in calls if name in alone}
    return {
        name: {
            "ms": statistics.median(plain[name]),
            "device_ms": statistics.median(device[name] or [math.nan]),
            "load_ms": loaded[name],
            **({"alone_ms": by_itself[name]} if name in by_itself else {}),
        }
        for name in calls
    }


def extra_memory_share(call: Callable[[], object], q: torch.Tensor) -> float:
    """Peak bytes that a call allocates beyond its output, over those of q, k, v and the output."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before - q.nbytes) / (4 * q.nbytes)


def random_mask(heads: int, length: int, block_q: int, block_k: int, density: float) -> BlockMask:
    return tune.random_mask(heads, length, block_q, block_k, density, torch.device("cuda"))


def operations(q: torch.Tensor, mask: BlockMask) -> float:
    batch, length, heads, dim = q.shape
    return 4 * batch * heads * length * length * dim * float(mask.density())


def with_token_bits(mask: BlockMask, patterns: int = 64) -> BlockMask:
    """The same blocks, each with one of a few random token masks that hide half of it."""
    shape, device = (patterns, mask.block_q, mask.block_k // 32), mask.kv_indices.device
    return replace(
        mask,
        kv_num_full=torch.zeros_like(mask.kv_num_full),
        kv_bits=torch.randint(patterns, mask.kv_indices.shape, dtype=torch.int32, device=device),
        token_bits=torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32, device=device),
    )


def sampled(
    q: torch.Tensor, mask: BlockMask, samples: int = 4
) -> Iterator[tuple[int, tuple[int, int, int], torch.Tensor]]:
    """A few query blocks of batch entry 0: head, place in the lists, slots."""
    nq, _ = mask.num_blocks
    for n in range(samples):
        head, block = (5 * n) % q.shape[2], (nq - 1) * n // max(1, samples - 1)
        slots = torch.arange(block * mask.block_q, min((block + 1) * mask.block_q, q.shape[1]), device=q.device)
        yield head, (0, min(head, mask.kv_indices.shape[1] - 1), block), slots


def exact_block(q, k, v, mask: BlockMask, head: int, at, slots, rows=None, key_mask=None) -> tuple[torch.Tensor, ...]:
    """float64 attention of a query block over what it sees: ``(output, its rows, the rows of its keys)``."""
    kept = mask.kv_indices[at][: int(mask.kv_num_blocks[at])].long()
    keys = (kept[:, None] * mask.block_k + torch.arange(mask.block_k, device=q.device)).flatten()
    partial = (torch.arange(len(kept), device=q.device) >= mask.kv_num_full[at]).repeat_interleave(mask.block_k)
    partial, keys = partial[keys < k.shape[1]], keys[keys < k.shape[1]]
    seen = query_block(mask, at).to_tokens()[0, 0, : len(slots), keys]
    if rows is not None:
        order = rows[0, min(head, rows.shape[1] - 1)].long()
        slots, keys = order[slots], order[keys]
    if key_mask is not None:
        seen = seen & (key_mask[0, keys] | ~partial)  # full blocks are not masked
    scores = q[0, slots, head].double() @ k[0, keys, head].double().T / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    weights = weights.masked_fill(~seen.any(-1, keepdim=True), 0)  # a query that sees nothing has output 0
    return weights @ v[0, keys, head].double(), slots, keys


def worst_error(pairs: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Largest relative error of pairs (found, exact); NaN if any is not finite."""
    errors = [((found.double() - exact).norm() / exact.norm()).item() for found, exact in pairs]
    return max(errors) if all(map(math.isfinite, errors)) else math.nan


def oracle_error(out: torch.Tensor, q, k, v, mask: BlockMask, rows=None, key_mask=None) -> float:
    """Relative error of a few query blocks of ``out`` against float64 attention over what they see."""

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for head, at, slots in sampled(q, mask):
            exact, own, _ = exact_block(q, k, v, mask, head, at, slots, rows, key_mask)
            yield out[0, own, head], exact

    return worst_error(pairs())


def query_gradient_error(dq: torch.Tensor, grad: torch.Tensor, q, k, v, mask: BlockMask, rows=None) -> float:
    """Relative error of a few query blocks of ``dq`` against float64; ``grad`` is the output's gradient."""

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        leaf = q.detach().double().requires_grad_()
        for head, at, slots in sampled(q, mask):
            exact, own, _ = exact_block(leaf, k.detach(), v.detach(), mask, head, at, slots, rows)
            (exact_dq,) = torch.autograd.grad(exact, leaf, grad[0, own, head].double())
            yield dq[0, own, head], exact_dq[0, own, head]

    return worst_error(pairs())


def sla_error(out: torch.Tensor, q, k, v, critical: BlockMask, everything: bool, weight, bias) -> float:
    """Relative error of a few query blocks of SLA's output against float64.

    ``everything``: the linear branch, of the softmax map, sums over all tokens, else over those not critical.
    """

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for head, at, slots in sampled(q, critical):
            exact, own, keys = exact_block(q, k, v, critical, head, at, slots)
            summed = torch.ones(k.shape[1], dtype=torch.bool, device=k.device)
            summed[keys] = everything
            phi = k[0, summed, head].double().softmax(-1)
            features = q[0, own, head].double().softmax(-1)
            branch = features @ (phi.T @ v[0, summed, head].double()) / (features @ phi.sum(0))[:, None]
            yield out[0, own, head], exact + branch @ weight.double().T + bias.double()

    with torch.no_grad():
        return worst_error(pairs())


def query_block(mask: BlockMask, at: tuple[int, int, int]) -> BlockMask:
    """The mask of one query block alone, a whole one: what it lists, of a batch entry and head."""
    lists = {
        name: getattr(mask, name)[at][None, None, None]
        for name in ("kv_num_blocks", "kv_num_full", "kv_indices", "kv_bits")
        if getattr(mask, name) is not None
    }
    return replace(mask, q_len=mask.block_q, **lists)


def checked(q, k, v, mask: BlockMask, rows=None, key_mask=None) -> Callable[[str, Callable], dict[str, object]]:
    """What is said of a call: its error against the fp64 oracle, and its memory."""

    def check(_name: str, call: Callable) -> dict[str, object]:
        error = oracle_error(call(), q, k, v, mask, rows, key_mask)
        return {"error": error, "extra_memory_share": extra_memory_share(call, q)}

    return check


class Report:
    """Rows of one run; a failing item is recorded and the run goes on, without time left it is left out."""

    def __init__(self, until: float = math.inf) -> None:
        self.rows: list[dict[str, object]] = []
        self.until = until

    def _out_of_time(self, labels: dict[str, object]) -> bool:
        if time.monotonic() < self.until:
            return False
        self._record({**labels, "skipped": "out of time"})
        return True

    def _record(self, row: dict[str, object]) -> dict[str, object]:
        self.rows.append(row)
        text = (f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items())
        print("  ".join(text), flush=True)
        return row

    def _failed(self, labels: dict[str, object], error: Exception) -> dict[str, object]:
        traceback.print_exc(limit=3)
        return self._record({**labels, "error": f"{type(error).__name__}: {str(error)[:160]}"})

    def add(self, function: Callable[[], dict[str, object]], **labels: object) -> dict[str, object]:
        if self._out_of_time(labels):
            return {}
        try:
            found = function()
        except Exception as error:
            return self._failed(labels, error)
        return self._record({**labels, **found})

    def turns(
        self,
        makers: dict[str, Callable[[], Callable[[], object]]],
        check: Callable[[str, Callable[[], object]], dict[str, object]],
        base: str,
        work: float,
        alone: Collection[str] = (),
        **labels: object,
    ) -> None:
        """A row for every call, timed in turns.

        Args:
            makers: make the calls; one that raises is a row with its error.
            check: runs a call once and describes it.
            base: the call whose time the others are compared with.
            work: operations of a call, for ``eff``.
            alone: calls that are also timed without the others in between.
        """
        if self._out_of_time(labels):
            return
        calls, found = {}, {}
        for name, make in makers.items():
            try:
                calls[name] = make()
                found[name] = check(name, calls[name])
            except Exception as error:
                calls.pop(name, None)
                self._failed({**labels, "op": name}, error)
        try:
            times = in_turns(calls, alone)
        except Exception as error:
            self._failed({**labels, "op": "in turns"}, error)
            return
        for name, time_of in times.items():
            row = {**labels, "op": name, **time_of}
            for key, prefix in PREFIXES.items():
                if key not in time_of:
                    continue
                row[f"{prefix}eff"] = work / time_of[key] / 1e9
                if key in times.get(base, ()):
                    row[f"{prefix}over_{base}"] = times[base][key] / time_of[key]
            self._record({**row, **found[name]})


def inputs(length: int, heads: int, dim: int) -> list[torch.Tensor]:
    return [torch.randn(1, length, heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def dense_cudnn(q, k, v) -> Callable[[], torch.Tensor]:
    head_major = [x.transpose(1, 2) for x in (q, k, v)]

    def call() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(*head_major)

    return call


def dense_backward_cudnn(q, k, v, grad) -> Callable[[], object]:
    def call() -> object:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return torch.autograd.grad(out, (q, k, v), grad.transpose(1, 2))

    return call


def dense_fa4(q, k, v) -> Callable[[], torch.Tensor]:
    """flash-attn-4, dense; raises ImportError where it is not installed."""
    from flash_attn.cute import flash_attn_func

    return lambda: flash_attn_func(q, k, v)[0]


def sparse_fa4(q, k, v, mask: BlockMask) -> Callable[[], torch.Tensor]:
    """flash-attn-4 on the blocks of ``mask``, its lists made beforehand."""
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    from dit_accel.kernels.attention.flash_attn4 import block_lists

    lists = block_lists(mask.kv_num_blocks, mask.kv_indices, mask.kv_num_full, mask.block_k, mask.kv_len)
    blocks = BlockSparseTensorsTorch(*lists, block_size=(mask.block_q, mask.block_k))
    return lambda: flash_attn_func(q, k, v, block_sparse_tensors=blocks, return_lse=True)[0]
