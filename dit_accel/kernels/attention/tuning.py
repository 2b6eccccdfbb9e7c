"""Launch parameters of the Triton kernels: a checked-in table per GPU, elsewhere what fits its shared memory."""

from __future__ import annotations

import json
import os
from functools import cache
from importlib import resources
from typing import Any

import torch

from ..common import capability
from ..common.choice import Case
from ..common.launch import padded_head_dim
from ..mask.block_mask import BlockMask
from .launch_configs import SMALLEST_TILE, LaunchConfig, Unit, Work, lowered

# Path of a table that ``dit-accel bench --kernels --out`` wrote; for GPUs of its name it replaces ours.
TABLE_VARIABLE = "DIT_ACCEL_TUNING_TABLE"


@cache
def _table(device_name: str) -> dict[str, Any]:
    """What was measured on a GPU.

    ``entries``: ``"op/block_q x block_k/padded head dim/order" -> [num_warps, num_stages]``;
    ``fa4_fastest``: such keys of forwards that flash-attn-4 runs faster than any kernel of ours.

    Raises:
        ValueError: the user's own table is damaged.
    """
    own = os.environ.get(TABLE_VARIABLE)
    if own:
        table = _read(own)
        if device_name.startswith(table["device"]):
            return table
    known = {"NVIDIA H200": "h200.json", "NVIDIA H100": "h200.json"}
    for prefix, name in known.items():
        if device_name.startswith(prefix):
            file = resources.files(__package__) / "tuning_tables" / name
            return dict(json.loads(file.read_text(encoding="utf-8")))
    return {"device": "", "entries": {}, "fa4_fastest": []}


def _read(path: str) -> dict[str, Any]:
    """A table that ``dit-accel bench --kernels --out`` wrote."""
    anew = "Write it anew with `dit-accel bench --kernels --out FILE`, or unset the variable."
    try:
        with open(path, encoding="utf-8") as file:
            table = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{TABLE_VARIABLE} names {path}, which is no table ({error}). {anew}") from error
    wrong = _what_is_wrong(table)
    if wrong is not None:
        raise ValueError(f"{TABLE_VARIABLE} names {path}, a damaged table: {wrong}. {anew}")
    return {name: table[name] for name in ("device", "entries", "fa4_fastest")}


def _what_is_wrong(table: Any) -> str | None:
    for name, kind in (("device", str), ("entries", dict), ("fa4_fastest", list)):
        value = table.get(name) if isinstance(table, dict) else None
        if not isinstance(value, kind):
            return f"{name} must be a {kind.__name__}, got {value!r}"
    for key, entry in table["entries"].items():
        if not isinstance(entry, list) or len(entry) != 2 or any(type(n) is not int or n < 1 for n in entry):
            return f"entries[{key!r}] must be warps and stages, got {entry!r}"
        if entry[0] & (entry[0] - 1) or entry[0] > 32:
            return f"entries[{key!r}] must have a power of two warps, 32 at most, got {entry[0]}"
    return None


@cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def _stage_bytes(q: torch.Tensor, mask: BlockMask) -> int:
    """Shared memory of a stage: a block of keys and one of values, and a word a pair of tokens where bits mask them."""
    bits = 0 if mask.token_bits is None else 4 * mask.block_q * mask.block_k
    return 2 * mask.block_k * padded_head_dim(q.shape[-1]) * q.element_size() + bits


def entry_key(op: str, block_q: int, block_k: int, head_dim: int, permuted: bool) -> str:
    """Key of the table; head dims are padded to a power of two as the kernels do."""
    padded = padded_head_dim(head_dim)
    return f"{op}/{block_q}x{block_k}/d{padded}/{'permuted' if permuted else 'in_order'}"


def launch_config(op: str, q: torch.Tensor, mask: BlockMask, permuted: bool) -> LaunchConfig:
    """The table's entry for a call, or a default that fits the GPU's shared memory."""
    dim, bits = q.shape[-1], mask.token_bits is not None
    columns = padded_head_dim(dim)
    work = Work(op, mask.block_q, mask.block_k, columns, q.element_size(), bits, permuted, columns != dim)
    if not q.is_cuda:  # interpreted
        return _usual(work)
    index = q.device.index or 0
    found = None
    if q.dtype != torch.float32:
        found = _table(_device_name(index))["entries"].get(entry_key(op, mask.block_q, mask.block_k, dim, permuted))
    if found is None:
        return _default(work, *matrix_unit(index))
    warps, stages = found
    if bits:  # the table was measured without
        room = capability.shared_memory(index) - mask.block_q * padded_head_dim(dim) * q.element_size()
        stages = max(1, min(stages, room // _stage_bytes(q, mask)))
    return LaunchConfig(warps, stages)


@cache
def matrix_unit(index: int) -> tuple[Unit, int]:
    """Who multiplies matrices on a GPU, and the bytes of its shared memory."""
    limit = capability.shared_memory(index)
    if capability.is_amd():
        return ("wave64" if torch.cuda.get_device_properties(index).warp_size == 64 else "wave32"), limit
    # wgmma of Hopper, tcgen05 of data-centre Blackwell; all others have mma.sync.
    return ("warpgroup" if capability.compute_capability(index)[0] in (9, 10, 11) else "warp"), limit


@cache
def _default(work: Work, unit: Unit, limit: int) -> LaunchConfig:
    """A configuration for a kind of GPU that has no table, chosen by what compilers say of registers.

    Where it would take more than ``limit`` bytes of shared memory, :func:`~.launch_configs.lowered` takes less.
    """
    if work.element_bytes == 4:
        config = _float32(work)
    else:
        config = _usual(work) if unit == "warpgroup" else _by_warps(work, unit)
    return lowered(work, config, limit, unit)


def _usual(work: Work) -> LaunchConfig:
    """Whole blocks, and as many stages as 96 KiB hold."""
    warps = 8 if work.block_q * work.columns >= 128 * 128 else 4
    if max(work.block_q, work.block_k) <= 32:
        warps = _few_warps(warps, work.block_q, work.columns)
    stage = 2 * work.block_k * work.columns * work.element_bytes + 4 * work.block_q * work.block_k * work.has_bits
    return LaunchConfig(warps, max(1, min(3, (96 << 10) // stage)))


def _few_warps(warps: int, rows: int, columns: int) -> int:
    """Each warp multiplies 16 rows at a time: more of them would share out columns, and wait for each other."""
    return max(1, min(warps, rows * columns // 1024))


def _by_warps(work: Work, unit: Unit) -> LaunchConfig:
    """Where each warp multiplies 16 rows by itself: a warp for every 16 rows, and 64 rows of the other side.

    Twice as many rows a warp, or 128 rows of the other side, spill up to 3 KB a thread at head dim 128. Wide heads
    take half the rows for as many warps.
    """
    wide = work.columns >= 256
    if work.op == "backward_dkv":
        kept, walked = min(work.block_k, 64), min(work.block_q, 32 if wide else 64)
        warps = 8 if work.columns >= 128 else 4
    else:
        kept, walked = min(work.block_q, 64 if wide else 128), min(work.block_k, 32 if wide else 64)
        warps = 8 if wide else kept // SMALLEST_TILE
    stages = 3
    if work.op == "forward" and work.permuted and work.columns == 128:
        # Of rows that are gathered the compiler keeps one buffer also in three stages, which spill 36 bytes (8.0 to
        # 8.9) or 160 (12.0) for it.
        stages = 2
        if work.padded:
            stages, warps = 3, 8
            walked = min(walked, 32 if kept == 128 else 64)
    if unit == "wave32" and work.columns >= 128:
        # 256 registers a lane: twice the tile spills 600 bytes.
        kept, walked, stages = min(kept, 64), min(walked, 32), 1
        warps = max(1, kept // SMALLEST_TILE)
    if kept <= 32:
        warps = _few_warps(4, kept, work.columns)
    if unit == "wave64":
        warps = max(1, warps // 2)
    tile_q, tile_k = (walked, kept) if work.op == "backward_dkv" else (kept, walked)
    return LaunchConfig(warps, stages, tile_q, tile_k)


def _float32(work: Work) -> LaunchConfig:
    """Exact products have no matrix unit, and a thread loads whole rows for each: few a thread spill little."""
    wide = work.columns >= 256
    tile_q, tile_k = min(work.block_q, 32), min(work.block_k, 16 if wide else 32)
    if work.op != "forward" and wide:
        tile_q = SMALLEST_TILE
    return LaunchConfig(max(1, min(8, tile_q * tile_k // (64 if wide else 128))), 1, tile_q, tile_k)


def fa4_is_fastest(case: Case) -> bool:
    """Whether the table lists a forward of this head dim and block size as faster on flash-attn-4."""
    if case.device.type != "cuda" or case.head_dim is None or case.blocks is None:
        return False
    key = entry_key("forward", *case.blocks, case.head_dim, False)
    return key in _table(_device_name(case.device.index or 0))["fa4_fastest"]
