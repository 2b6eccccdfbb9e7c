"""Launch parameters of the Triton kernels: a checked-in table per GPU, a safe default elsewhere."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch

from ..common.choice import Case
from ..common.launch import padded_head_dim
from ..mask.block_mask import BlockMask

# Path of a table that ``dit-accel bench --kernels --out`` wrote; for GPUs of its name it replaces ours.
TABLE_VARIABLE = "DIT_ACCEL_TUNING_TABLE"


@dataclass(frozen=True)
class LaunchConfig:
    """Warps per program and software-pipelining depth of a launch."""

    num_warps: int
    num_stages: int


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


@cache
def _shared_memory(index: int) -> int:
    """Bytes of shared memory that a program may have on a GPU."""
    properties: Any = torch.cuda.get_device_properties(index)  # torch's own types leave this one out
    return int(properties.shared_memory_per_block_optin)


def _stage_bytes(q: torch.Tensor, mask: BlockMask) -> int:
    """Shared memory of a stage: a block of keys and one of values, and a word a pair of tokens where bits mask them."""
    bits = 0 if mask.token_bits is None else 4 * mask.block_q * mask.block_k
    return 2 * mask.block_k * padded_head_dim(q.shape[-1]) * q.element_size() + bits


def entry_key(op: str, block_q: int, block_k: int, head_dim: int, permuted: bool) -> str:
    """Key of the table; head dims are padded to a power of two as the kernels do."""
    padded = padded_head_dim(head_dim)
    return f"{op}/{block_q}x{block_k}/d{padded}/{'permuted' if permuted else 'in_order'}"


def launch_config(op: str, q: torch.Tensor, mask: BlockMask, permuted: bool) -> LaunchConfig:
    """The table's entry for a call, or a default that fits any GPU's shared memory."""
    dim = q.shape[-1]
    if q.is_cuda and q.dtype != torch.float32:
        found = _table(_device_name(q.device.index or 0))["entries"].get(
            entry_key(op, mask.block_q, mask.block_k, dim, permuted)
        )
        if found is not None:
            warps, stages = found
            if mask.token_bits is not None:  # the table was measured without
                room = _shared_memory(q.device.index or 0) - mask.block_q * padded_head_dim(dim) * q.element_size()
                stages = max(1, min(stages, room // _stage_bytes(q, mask)))
            return LaunchConfig(warps, stages)
    padded = padded_head_dim(dim)
    warps = 8 if mask.block_q * padded >= 128 * 128 else 4
    if max(mask.block_q, mask.block_k) <= 32:
        # Each warp multiplies 16 rows at a time: more of them would share out columns, and wait for each other.
        warps = max(1, min(warps, mask.block_q * padded // 1024))
    stages = max(1, min(3, (96 << 10) // _stage_bytes(q, mask)))
    return LaunchConfig(warps, stages)


def fa4_is_fastest(case: Case) -> bool:
    """Whether the table lists a forward of this head dim and block size as faster on flash-attn-4."""
    if case.device.type != "cuda" or case.head_dim is None or case.blocks is None:
        return False
    key = entry_key("forward", *case.blocks, case.head_dim, False)
    return key in _table(_device_name(case.device.index or 0))["fa4_fastest"]
