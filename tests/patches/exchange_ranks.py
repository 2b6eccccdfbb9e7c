"""What the processes of test_head_exchange.py do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.patches.head_exchange import HeadExchange
from tests.patches.ulysses_ranks import begin, end

# Batch, heads, tokens of each stream, and whether the processes may have different numbers.
CASES = {
    "one stream": (1, 6, (12,), False),
    "text and latents": (1, 6, (6, 18), False),
    "guidance in a batch": (2, 6, (6, 12), False),
    "uneven heads and tokens": (2, 5, (7, 11), True),
    "fewer tokens than processes": (2, 5, (1, 11), True),
}


COPIES = (torch.ops.aten.clone, torch.ops.aten.cat, torch.ops.aten.copy_, torch.ops.aten.index)


class Moved(TorchDispatchMode):
    """Counts elements that operations write anew, exchanges apart."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (
            torch.ops.aten.clone,
            torch.ops.aten.cat,
            torch.ops.aten.copy_,
            torch.ops.aten.index,
        ):
            self.elements += out.numel()
        return out


def exchanged(rank: int, ranks: int, path: Path) -> None:
    """There and back in every case: what came, gradients, and elements copied over those of the tensor."""
    begin(rank, ranks, path)
    mesh = SimpleNamespace(get_group=lambda: dist.group.WORLD)
    found = {}
    for name, (batch, heads, streams, anything) in CASES.items():
        config = SimpleNamespace(
            ulysses_degree=ranks, _ulysses_local_rank=rank, _ulysses_mesh=mesh, ulysses_anything=anything
        )
        exchange = HeadExchange(config, heads)
        generator = torch.Generator().manual_seed(0)
        whole = torch.randn(batch, sum(streams), heads, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        parts = [stream.tensor_split(ranks, 1) for stream in whole.split(streams, 1)]
        mine = torch.cat([part[rank] for part in parts], 1)
        lengths = [[part.shape[1] for part in stream] for stream in parts]
        with torch.no_grad(), Moved() as out:
            there = exchange.there(mine, lengths)
        with torch.no_grad(), Moved() as home:
            back = exchange.back(there, mine.shape[1], lengths)
        weights = torch.randn(mine.shape, generator=generator, dtype=torch.float64)
        again = exchange.back(exchange.there(mine, lengths) * 2.0, mine.shape[1], lengths)
        (gradient,) = torch.autograd.grad((again * weights).sum(), mine, retain_graph=True)
        shard = exchange.shard
        found[name] = {
            "there": there,
            "expected": whole[:, :, shard.first : shard.first + shard.number].detach(),
            "back": back,
            "mine": mine.detach(),
            "gradient": gradient,
            "expected gradient": 2.0 * weights,
            "as they came": exchange.back(exchange.there(mine), mine.shape[1]).detach(),
            "copies": (out.elements / mine.numel(), home.elements / mine.numel()),
            "heads side by side": there.stride(2) == there.shape[3],
        }
    end(rank, path, found)
