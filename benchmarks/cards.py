"""What the portable kernels take of every card: registers, spills and shared memory, compiled without a GPU.

    python -m benchmarks.cards                              # every call on every card; hours of one core
    python -m benchmarks.cards --representative --jobs 2    # what each run of the tests compiles
    python -m benchmarks.cards --card sm_89 --holds "forward 128"
    python -m benchmarks.cards --out benchmarks/results/cards.json     # ... and what docs/hardware.md is written from

The exit code is 1 where a launch needs more shared memory than its card has, where a forward kernel spills more than
64 bytes a thread without being listed in :data:`KNOWN_SPILLS`, or where products of 16 or 8 bits miss the card's matrix
unit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dit_accel.kernels.attention.launch_configs import LaunchConfig, Work, shared_bytes

from .card_list import CARDS, Card, card

ROOT = Path(__file__).parent.parent
MOST_SPILLED = 64
TENSOR_COLUMNS = 512  # of tensor memory, which tcgen05 adds up in

# Compiled in each run of the tests, by card; together about a minute and a half of one core.
_PERMUTED, _WIDE = "forward 128 bfloat16 128x64 permuted", "forward 256 bfloat16 128x128 permuted"
_EXACT, _BACKWARD = "forward 256 float32 128x64 permuted", "backward 128 bfloat16 128x64 in order"
_TURNED = "int8 128 bfloat16 64x64 permuted rotated"
_MASS = "block mass 128x64 128 torch.bfloat16 rows"
REPRESENTATIVE: dict[str, tuple[str, ...]] = {
    "sm_80": (_PERMUTED, _WIDE),
    "sm_86": (_PERMUTED, _EXACT, "int8 128 bfloat16 128x64 permuted", "pyramid 256 torch.bfloat16 128"),
    "sm_89": (
        _PERMUTED,
        _WIDE,
        _BACKWARD,
        "forward 72 float16 64x128 permuted",
        "int8_fp8 64 float16 128x128 permuted",
    ),
    "sm_90": (_PERMUTED, _WIDE, "linear inference 128 torch.bfloat16 softmax"),
    "sm_100": (_PERMUTED, _WIDE, _BACKWARD),
    "sm_120": (_PERMUTED, _WIDE, _EXACT, _BACKWARD, _MASS, "deviation 128 torch.bfloat16 rows", _TURNED),
    "gfx942": (_PERMUTED, "linear inference 64 torch.bfloat16 softmax"),
    "gfx1100": (_PERMUTED, _MASS),
}
# Bytes that a thread spills in a forward kernel, by card, call and kernel: seen, and not mended yet.
KNOWN_SPILLS: dict[tuple[str, str, str], int] = {
    ("sm_89", "linear inference 128 torch.bfloat16 softmax", "linear_state_fwd_kernel"): 128,
    ("sm_89", "linear inference 128 torch.bfloat16 softmax all hidden", "linear_state_fwd_kernel"): 136,
    ("sm_89", "block mass 256x128 256 torch.bfloat16 rows hidden", "block_mass_fwd_kernel"): 640,
    ("sm_90", "forward 256 bfloat16 128x128 permuted", "block_sparse_fwd_kernel"): 240,
    ("sm_90", "linear inference 128 torch.bfloat16 softmax", "linear_state_fwd_kernel"): 156,
    ("sm_100", "forward 256 bfloat16 128x128 permuted", "block_sparse_fwd_kernel"): 340,
    ("gfx1100", "block mass 128x64 128 torch.bfloat16 rows", "block_mass_fwd_kernel"): 1256,
    ("gfx1100", "means 128 torch.bfloat16 128 rows", "left_out_means_fwd_kernel"): 532,
    ("gfx1100", "means 128 torch.bfloat16 64", "left_out_means_fwd_kernel"): 524,
    ("gfx1100", "means 128 torch.bfloat16 64 rows hidden", "left_out_means_fwd_kernel"): 584,
    ("gfx1100", "means 256 torch.bfloat16 128 rows", "left_out_means_fwd_kernel"): 1404,
    ("gfx1100", "means 256 torch.bfloat16 64", "left_out_means_fwd_kernel"): 1400,
    ("gfx1100", "means 256 torch.bfloat16 64 rows hidden", "left_out_means_fwd_kernel"): 1612,
    ("gfx1100", "means 64 torch.bfloat16 64 rows hidden", "left_out_means_fwd_kernel"): 80,
    ("gfx1100", "means 64 torch.float32 128 rows", "left_out_means_fwd_kernel"): 144,
    ("gfx1100", "means 64 torch.float32 64", "left_out_means_fwd_kernel"): 136,
    ("gfx1100", "means 64 torch.float32 64 rows hidden", "left_out_means_fwd_kernel"): 92,
    ("gfx1100", "means 72 torch.bfloat16 128 rows", "left_out_means_fwd_kernel"): 928,
    ("gfx1100", "means 72 torch.bfloat16 64", "left_out_means_fwd_kernel"): 968,
    ("gfx1100", "means 72 torch.bfloat16 64 rows hidden", "left_out_means_fwd_kernel"): 1196,
    ("gfx1100", "means 96 torch.bfloat16 128 rows", "left_out_means_fwd_kernel"): 564,
    ("gfx1100", "means 96 torch.bfloat16 64", "left_out_means_fwd_kernel"): 556,
    ("gfx1100", "means 96 torch.bfloat16 64 rows hidden", "left_out_means_fwd_kernel"): 596,
}
OPERATIONS = {
    "block_sparse_fwd_kernel": "forward",
    "block_sparse_bwd_dq_kernel": "backward_dq",
    "block_sparse_bwd_dkv_kernel": "backward_dkv",
}
# Forward kernels whose products are of the inputs: the others have none, or of float32.
_MULTIPLY = frozenset(
    (
        *OPERATIONS,
        "quantized_fwd_kernel",
        "pyramid_fwd_kernel",
        "left_out_means_fwd_kernel",
        "block_mass_fwd_kernel",
        "linear_state_fwd_kernel",
        "linear_out_fwd_kernel",
    )
)
Row = dict[str, Any]


def compiled(
    on: Card, only: Sequence[str] = (), holds: str = "", jobs: int = 1, pretend_kib: int | None = None
) -> list[Row]:
    """A row for every kernel that a card's calls launch, as ``card_calls.py`` prints it.

    Launchers are told that a program may have ``pretend_kib`` KiB of shared memory, the card's own if None.
    """
    command = [sys.executable, "-m", "benchmarks.card_calls", "--card", on.name, "--holds", holds]
    command += [part for name in only for part in ("--only", name)]
    command += [] if pretend_kib is None else ["--pretend-kib", str(pretend_kib)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as empty:
        # A cache of its own: what is found in one was not assembled, and nothing is said of it.
        env = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": empty, "TRITON_INTERPRET": "0"}
        running = [
            subprocess.Popen([*command, "--share", f"{n}/{jobs}"], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
            for n in range(jobs)
        ]
        printed = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"The calls of {on.name} did not run; the error is above.")
    return [json.loads(line) for text in printed for line in text.splitlines()]


def counted(row: Row, on: Card) -> int | None:
    """Bytes of shared memory that the package counts for a kernel of attention; None for others."""
    op = OPERATIONS.get(row["kernel"])
    if op is None:
        return None
    tiles = row["tiles"]
    work = Work(op, tiles["BLOCK_Q"], tiles["BLOCK_K"], tiles["BLOCK_D"], 4 if "float32" in row["call"] else 2)
    config = LaunchConfig(row["warps"], row["stages"], tiles["TILE_Q"], tiles["TILE_K"])
    return shared_bytes(work, config, on.unit)


def faults(rows: Iterable[Row], on: Card, known: dict[tuple[str, str, str], int] | None = None) -> list[str]:
    """A sentence for every kernel that does not fit a card, spills in a forward, or misses the matrix unit."""
    known = KNOWN_SPILLS if known is None else known
    found = []
    for row in rows:
        where = f"{on.name}, {row['call']}"
        if "error" in row:
            found.append(f"{where}: does not compile ({row['error']}).")
            continue
        where += f", {row['kernel']}"
        if row["shared"] > on.shared_kib << 10:
            found.append(f"{where}: takes {row['shared']} bytes of shared memory of {on.shared_kib << 10}.")
        count = counted(row, on)
        if count is not None and row["shared"] > count:
            found.append(f"{where}: takes {row['shared']} bytes of shared memory, {count} are counted.")
        if row["tensor_columns"] > TENSOR_COLUMNS:
            found.append(f"{where}: takes {row['tensor_columns']} columns of tensor memory of {TENSOR_COLUMNS}.")
        allowed = known.get((on.name, row["call"], row["kernel"]), MOST_SPILLED)
        if "fwd" in row["kernel"] and row["spills"] > allowed:
            found.append(f"{where}: spills {row['spills']} bytes a thread, {allowed} are allowed.")
        if row["kernel"] in _MULTIPLY and "float32" not in row["call"]:
            others = [name for name in row["products"] if not name.startswith(on.products)]
            if others or not row["products"]:
                found.append(f"{where}: multiplies by {', '.join(others) or 'no matrix unit'}, not {on.products}.")
        summed = row["kernel"] == "quantized_fwd_kernel" and row["call"].startswith("int8 ")
        if summed and on.sums_in_half != any(name.endswith("in f16") for name in row["products"]):
            found.append(f"{where}: must {'' if on.sums_in_half else 'not '}sum values in float16 on this card.")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", action="append", default=[], help="such as sm_89; more than once for several")
    parser.add_argument("--holds", default="", help="what a call's name must hold")
    parser.add_argument("--representative", action="store_true", help="what each run of the tests compiles")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile at once")
    parser.add_argument("--out", type=Path, help="where the rows go, as JSON")
    asked = parser.parse_args()
    if asked.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {asked.jobs}.")
    rows: list[Row] = []
    wrong: list[str] = []
    for on in [card(name) for name in asked.card] or CARDS:
        only = [name for name in REPRESENTATIVE[on.name] if asked.holds in name] if asked.representative else []
        if asked.representative and not only:
            continue
        of_card = compiled(on, only, asked.holds, asked.jobs)
        rows += of_card
        wrong += faults(of_card, on)
        print(f"{on.name}: {len(of_card)} kernels", flush=True)
        if asked.out:
            asked.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("\n".join(wrong) or "Every kernel fits its card.")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
