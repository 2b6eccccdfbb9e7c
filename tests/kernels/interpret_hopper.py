"""Run the Hopper kernel without a GPU: compile it, turn its IR into Python (``ttgir.py``), compare with fp64.

    python -m tests.kernels.interpret_hopper NAME ... [--fault NAME] [--orders N]

Prints, as JSON, what each case finds wrong, or None. In a process of its own: the tests interpret Triton, and the
driver that is set here stands in for a GPU. Kernels are compiled no further than to that IR, into a cache of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from dataclasses import replace
from typing import Any

import torch
from triton import knobs
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from dit_accel.kernels import BlockMask, quantized_block_sparse_attention
from dit_accel.kernels.attention.hopper import (
    consumer,
    epilogue,
    means,
    named_barriers,
    pair_consumer,
    producer,
    scales,
    softmax,
)
from dit_accel.kernels.attention.hopper import forward as hopper_forward
from dit_accel.kernels.common.launch import LOG2_E
from dit_accel.kernels.common.quantized_inputs import reference_quantize
from dit_accel.kernels.mask.query_pairs import query_pairs

from .compile_hopper import StandIn
from .means_oracle import attention_over_means, means_of
from .oracle import UNIT_ROUNDOFF, assert_close, dense_attention, visible_tokens
from .test_block_sparse import build
from .ttgir import translate
from .ttgir_machine import Functions, Machine, Pointer, Stuck, Warps

PROGRAMS = 2
CASES: dict[str, dict[str, Any]] = {
    # name: of test_block_sparse.build, and of the launch. ``slope``: octaves by which a row's logits rise or fall.
    "half": {"block": (128, 64), "length": 500},
    "half 128": {"block": (128, 128), "length": 390, "empty_rows": True},
    "half rows": {"block": (128, 128), "length": 390, "rows": (1, 3), "ring": 2},
    "half rows bits": {"block": (128, 64), "length": 300, "rows": (1, 3), "bits": True, "key_mask": True},
    "int8": {"block": (128, 64), "length": 390, "precision": "int8", "key_scales": "thread"},
    "int8 rows": {"block": (128, 128), "length": 390, "precision": "int8", "rows": (1, 3), "key_mask": True},
    "int8_fp8": {"block": (128, 128), "length": 390, "precision": "int8_fp8", "empty_rows": True},
    "int8_fp8 rows bits": {"block": (128, 64), "length": 300, "precision": "int8_fp8", "rows": (1, 3), "bits": True},
    "pairs": {"block": (64, 64), "length": 640},
    "pairs 128": {"block": (64, 128), "length": 500, "empty_rows": True, "take_turns": True},
    "pairs D=64": {"block": (64, 64), "length": 390, "dim": 64, "key_mask": True, "stages": 3},
    "pairs rows": {"block": (64, 64), "length": 500, "rows": (1, 3), "empty_rows": True, "ring": 2},
    "pairs rows bits": {
        "block": (64, 128),
        "length": 300,
        "rows": (1, 3),
        "bits": True,
        "key_mask": True,
        "take_turns": True,
    },
    "pairs int8": {"block": (64, 64), "length": 640, "precision": "int8"},
    "pairs int8 apart": {
        "block": (64, 64),
        "length": 390,
        "precision": "int8",
        "key_scales": "thread",
        "lists": "apart",
        "take_turns": True,
    },
    "pairs int8 rows": {"block": (64, 128), "length": 500, "precision": "int8", "rows": (1, 3), "key_mask": True},
    "pairs int8_fp8": {"block": (64, 64), "length": 640, "precision": "int8_fp8", "empty_rows": True},
    "pairs int8_fp8 one empty": {"block": (64, 64), "length": 500, "precision": "int8_fp8", "lists": "one empty"},
    "pairs int8_fp8 rows bits": {
        "block": (64, 128),
        "length": 300,
        "precision": "int8_fp8",
        "key_scales": "thread",
        "rows": (1, 3),
        "bits": True,
    },
    "pairs int8_fp8 steep": {
        "block": (64, 64),
        "length": 390,
        "precision": "int8_fp8",
        "dim": 64,
        "slope": 400.0,
        "stages": 3,
    },
    "half wide": {"block": (128, 64), "length": 1000, "dim": 64, "wide_steps": True, "empty_rows": True, "stages": 2},
    "half wide rows bits": {
        "block": (128, 64),
        "length": 300,
        "dim": 64,
        "rows": (1, 3),
        "bits": True,
        "key_mask": True,
        "wide_steps": True,
        "stages": 4,
        "ring": 2,
    },
    "half wide steep": {
        "block": (128, 64),
        "length": 1000,
        "dim": 64,
        "slope": 400.0,
        "wide_steps": True,
        "keep_q": True,
        "stages": 3,
    },
    "half steep": {"block": (128, 64), "length": 390, "slope": 400.0},
    "pairs steep": {"block": (64, 64), "length": 390, "slope": 400.0},
    "pairs apart": {"block": (64, 64), "length": 500, "lists": "apart", "take_turns": True},
    "pairs one empty": {"block": (64, 64), "length": 500, "lists": "one empty", "stages": 4},
    # ``means``: tokens of each. In whole steps of 64 means, and not.
    "half means": {"block": (128, 64), "length": 640, "means": 64, "empty_rows": True},
    "half means of 8": {"block": (128, 64), "length": 509, "means": 8, "lists": "all"},
    "half means of 8, whole steps": {"block": (128, 64), "length": 512, "means": 8, "batch": 2, "lead": (2, 1)},
    "half means, many": {"block": (128, 64), "length": 4200, "heads": 1, "means": 64, "lists": "few"},
    "half means rows": {"block": (128, 64), "length": 500, "means": 64, "rows": (1, 3), "ring": 2},
    "half means rows of 4": {"block": (128, 64), "length": 1030, "means": 4, "rows": (1, 1), "stages": 3},
    "half means steep": {"block": (128, 64), "length": 390, "means": 2, "slope": 400.0},
    "means": {"block": (64, 64), "length": 640, "means": 64, "empty_rows": True},
    "means of 8": {"block": (64, 64), "length": 509, "means": 8, "lists": "apart"},
    "means of 4, 128": {"block": (64, 128), "length": 500, "means": 4, "lists": "one empty", "stages": 4},
    "means of 8, whole steps": {"block": (64, 64), "length": 512, "means": 8, "batch": 2, "lead": (2, 1)},
    "means, many": {"block": (64, 64), "length": 4200, "heads": 1, "means": 64, "lists": "few"},
    "means rows": {"block": (64, 64), "length": 500, "means": 64, "rows": (1, 3), "ring": 2},
    "means rows of 8": {"block": (64, 64), "length": 1030, "means": 8, "rows": (1, 1), "take_turns": True},
    "means D=64": {"block": (64, 64), "length": 390, "dim": 64, "means": 16, "stages": 3, "lists": "all"},
    "means steep": {"block": (64, 64), "length": 390, "means": 2, "slope": 400.0},
}
# Faults put into the kernel's source, of which each must show: where, what stands there, and what is put in its place.
WAIT = "acc, p_operand = warpgroup_mma_wait(0, deps=[pv_token, p_operand])\n"
FAULTS = {
    # It was there: a variable that begins as another one is a constant to Triton's front end.
    "first values": (
        producer.produce,
        "prev_block, prev_stage = gl.to_tensor(0), gl.to_tensor(0)",
        "prev_block, prev_stage = block, step % STAGES",
    ),
    "neighbour's block": (
        pair_consumer.consume_pair,
        "skip = (both <= entry + WG) & (entry + WG < short)",
        "skip = (both <= entry) & (entry < short)",
    ),
    "threads at a barrier": (
        pair_consumer.consume_pair,
        "pair_release(stage, (both <= entry) & (entry < short))",
        "pair_release(stage, (both < entry) & (entry < short))",
    ),
    "given back early": (
        consumer.consume,
        f"{WAIT}{' ' * 20}consumer_release_v(stage, STAGES)",
        f"consumer_release_v(stage, STAGES)\n{' ' * 20}{WAIT}",
    ),
    "keys not waited for": (
        consumer.consume,
        "next_stage, next_phase, entry + 1 < steps)",
        "next_stage, next_phase, entry + 2 < steps)",
    ),
    "a second block that is not there": (
        softmax.mask_two_blocks,
        "block = gl.where(listed, block, kv_len // BLOCK_K + 1)",
        "block = gl.where(listed, block, block)",
    ),
    "a partial block beside a full one": (
        softmax.mask_two_blocks,
        "entry + 1 < full, second, masked",
        "entry < full, second, masked",
    ),
    "a step too few": (consumer.consume, "(count + 1) // 2 if WIDE_STEPS", "count // 2 if WIDE_STEPS"),
    "the other block": (producer.produce, "at + 2 * entry + 3, mask", "at + 2 * entry + 2, mask"),
    "loaded early": (
        named_barriers.pair_acquire_v,
        "_sync(V_EMPTY + (step + PAIR_LAG) % STAGES, threads)",
        "_arrive(V_EMPTY + (step + PAIR_LAG) % STAGES, threads)",
    ),
    "a block's product is lost": (consumer.consume, "acc, entry > 1, FP8", "acc, entry > 2, FP8"),
    "another block's scale": (consumer.consume, "scales_at + following * SCALES", "scales_at + entry * SCALES"),
    "order of weights": (softmax.pack_p_fp8, "[first, second, third, fourth]", "[first, third, second, fourth]"),
    "another block's scale, pairs": (
        pair_consumer.consume_pair,
        "gl.load(scales_at + following * SCALES)",
        "gl.load(scales_at + entry * SCALES)",
    ),
    "another head's scales": (scales.key_scales_at, "sizes.k_rows // BLOCK_K", "sizes.k_rows // (2 * BLOCK_K)"),
    "a product of the wrong factor": (
        pair_consumer.consume_pair,
        "rescale_and_add_o(acc, prev_acc_scale, pv)",
        "rescale_and_add_o(acc, acc_scale, pv)",
    ),
    "rows behind a last pair": (epilogue.epilogue, "slot < sizes.q_rows if PAIRED else None", "None"),
    "means of what is read": (means.mean_scores, "gl.where(kept != 0, float", "gl.where(kept > 1, float"),
    "the other block's means": (
        pair_consumer.consume_pair,
        "tile_block(tile, sizes.nq) * 2 + WG",
        "tile_block(tile, sizes.nq) * 2",
    ),
    "the next word of bits": (means.kept_of_step, "at + first_bit // 32, mask", "at + first_bit // 32 + 1, mask"),
    "a last mean of as many tokens": (means.mean_scores, "means.log2_rest - means.log2_tokens", "0.0"),
    "means behind the last": (means.mean_scores, '- means.log2_tokens, float("-inf")', "- means.log2_tokens, 0.0"),
    "values of means end a step early": (
        producer.produce,
        "entry <= means.steps if MEANS",
        "entry < means.steps if MEANS",
    ),
    "means of another head": (producer.load_k_or_means, "head * means.rows + block", "head * means.cols + block"),
    "lists begin at the means": (producer.produce, "at -= means.steps", "at -= means.steps - 1"),
    "means scaled twice": (consumer.consume, "one if kind == 0 else", ""),
    "sums of an older maximum": (softmax.scale_apply_exp2, "row_sum * acc_scale +", "row_sum +"),
}


class Interprets:
    """In the kernel's place: compiles a launch and runs it."""

    def __init__(self, kernel: Any, seed: int) -> None:
        self.kernel, self.seed = kernel, seed

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **settings: Any) -> None:
            ttgir = self.kernel.warmup(*args, grid=grid, **settings).asm["ttgir"]
            text, parameters = translate(ttgir)
            scope: dict[str, Any] = {"torch": torch, "m": Functions}
            exec(compile(text, "<kernel>", "exec"), scope)
            named = dict(zip(self.kernel.arg_names, args, strict=False)) | settings
            values = list(arguments(parameters, named))
            machine = Machine(grid[0], random.Random(self.seed))
            machine.run([scope["kernel"](Warps(machine, n, 4), *values) for n in range(grid[0])])

        return launch


def arguments(parameters: list[str], named: dict[str, Any]) -> Any:
    """Of the IR's parameters: a descriptor comes with its sizes and strides, which the kernel does not read."""
    for parameter in parameters:
        name = parameter[1:]
        value = named.get(name)
        if name not in named:
            assert name.rsplit("_", 1)[0] in named, parameter
        yield Pointer.to(value) if isinstance(value, torch.Tensor) else value


def lists(name: str, heads: int, nq: int, nk: int) -> torch.Tensor:
    """Which blocks are kept, bool ``[1, heads, nq, nk]``."""
    torch.manual_seed(5)
    keep = torch.rand(1, heads, nq, nk) < (0.4 if name != "few" else 0.06)
    if name == "apart":
        keep[:, :, 1::2] &= ~keep[:, :, : 2 * (nq // 2) : 2]
    elif name == "all":
        keep[:, 0], keep[:, 1] = True, False
    elif name == "one empty":
        keep[:, 0, ::2] = keep[:, 1, 1::2] = False
    return keep


def find_fault(case: dict[str, Any], seed: int) -> str | None:
    """What is wrong with a case's output and log-sum-exp, or None."""
    settings = {"dim": 128, "dtype": torch.bfloat16, **case}
    options = {name: settings.pop(name) for name in ("precision", "key_scales") if name in settings}
    config = {
        name: settings.pop(name)
        for name in ("ring", "stages", "take_turns", "wide_steps", "keep_q")
        if name in settings
    }
    kept, slope, tokens = (settings.pop(name, None) for name in ("lists", "slope", "means"))
    q, k, v, mask, rows, hide, visible = build(**settings)
    length = q.shape[1]
    if slope is not None:
        q[..., 0] = torch.linspace(-1, 1, length).view(1, -1, 1)
        k[..., 0] = (torch.arange(length) / length).view(1, -1, 1) * slope * q.shape[-1] ** 0.5 / LOG2_E
    if kept is not None:
        keep = lists(kept, q.shape[2], *mask.num_blocks)
        mask = BlockMask.from_dense(keep, *settings["block"], length, length, backend="torch")
        visible = visible_tokens(mask, None, rows)
    ready = reference_quantize(q, k, v, *settings["block"], rows=rows, **options) if options else None
    block_k = hopper_forward.PAIR_KEYS if mask.block_q == 64 else mask.block_k
    default = hopper_forward.default_config(
        block_k, q.shape[-1], options.get("precision"), rows is not None, pairs=mask.block_q == 64
    )
    chosen = replace(default, **{"take_turns": mask.block_q == 128, **config})
    hopper_forward.hopper_fwd_kernel = Interprets(KERNEL, seed)
    scale = q.shape[-1] ** -0.5
    given = None if tokens is None else means_of(k, v, mask, rows, tokens)
    try:
        out, lse = hopper_forward.hopper_forward(
            q, k, v, mask, rows, hide, scale, quantized=ready, config=chosen, means=given
        )
    except Stuck as error:
        return str(error)
    if given is None:
        exact, exact_lse = dense_attention(q, k, v, visible, rows)
        eager, eager_lse = dense_attention(q, k, v, visible, rows, dtype=torch.float32)
    else:
        exact, exact_lse = attention_over_means(q, k, v, mask, rows, given)
        eager, eager_lse = attention_over_means(q, k, v, mask, rows, given, dtype=torch.float32)
    rounding = UNIT_ROUNDOFF[q.dtype]
    if ready is not None:
        # As in test_quantized.py: from the same numbers, with weights of 4 bits in e4m3.
        exact, exact_lse = eager, eager_lse = quantized_block_sparse_attention(
            q, k, v, mask, rows=rows, key_mask=hide, return_lse=True, backend="reference", quantized=ready,
            precision=options["precision"],
        )  # fmt: skip
        eager_lse = exact_lse + 1e-3
        rounding = 2.0**-5 if options["precision"] == "int8_fp8" else rounding / 2
    eager = eager.double() + rounding * v.double().abs().amax()
    try:
        assert_close(out, exact, eager, q.dtype, "out")
        seen = exact_lse.isfinite()
        error = (out.double() - exact.double()).norm() / exact.double().norm()
        assert ready is None or error <= 2 * rounding + UNIT_ROUNDOFF[q.dtype], f"out: relative error {error:.3e}"
        assert torch.equal(lse.isfinite(), seen), "lse is finite elsewhere"
        assert_close(lse[seen], exact_lse[seen], eager_lse[seen], torch.float32, "lse")
        assert torch.all(out[~seen.transpose(1, 2)] == 0), "out of rows that see nothing"
    except AssertionError as error:
        return str(error).split("\n")[0]
    return None


KERNEL = hopper_forward.hopper_fwd_kernel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="+", choices=CASES)
    parser.add_argument("--orders", type=int, default=2, help="in how many random orders warps go on")
    parser.add_argument("--fault", choices=FAULTS)
    args = parser.parse_args()
    driver.set_active(StandIn())
    # What comes after the IR takes most of the time.
    CUDABackend.make_llir = lambda _self, _module, metadata, *_: str(metadata.update(shared=0, name="kernel"))
    CUDABackend.make_ptx = lambda *_: ""
    CUDABackend.make_cubin = lambda *_: b""
    hopper_forward.multiprocessors = lambda index: PROGRAMS
    # The lists are another kernel's.
    hopper_forward.query_pairs = lambda mask, block_k, backend: query_pairs(mask, block_k, "torch")
    if args.fault:
        function, sound, faulty = FAULTS[args.fault]
        assert sound in function.src
        function._unsafe_update_src(function.src.replace(sound, faulty))
    with tempfile.TemporaryDirectory() as cache:
        knobs.cache.dir = cache
        for name in args.names:
            found = (find_fault(CASES[name], seed) for seed in range(args.orders))
            print(json.dumps({"name": name, "wrong": next(filter(None, found), None)}), flush=True)


if __name__ == "__main__":
    main()
