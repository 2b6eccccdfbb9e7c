"""How diffusers' context parallelism shares tokens and heads out."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..heads import HeadShard
from ..ring import RingShard


def splits_text(model: nn.Module) -> bool:
    """Whether diffusers' context parallelism splits a prompt's tokens by themselves, apart from the latents."""
    for module in model.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        for name, hook in {} if registry is None else registry.hooks.items():
            given, _, where = name.partition("---")
            # Before the model, or where its text has been embedded.
            if given == "cp_input" and ("encoder_hidden_states" in hook.metadata or where == "context_embedder"):
                return True
    return False


def split(tokens: int, ranks: int) -> list[int]:
    """Tokens of each rank, as ``torch.tensor_split`` and an even split have them."""
    each, more = divmod(tokens, ranks)
    return [each + (rank < more) for rank in range(ranks)]


def lengths_of(own: int, ranks: int, anything: bool, group: Any) -> list[int]:
    """Tokens of each process; where these may differ they are asked for, as diffusers does in every call."""
    if not anything:
        return [own] * ranks
    from diffusers.models._modeling_parallel import gather_size_by_comm

    found: list[int] = gather_size_by_comm(own, group)
    return found


def whole_mask(mask: torch.Tensor, lengths: list[int], rank: int, group: Any) -> torch.Tensor:
    """A mask of this process' keys as one of all keys, in the processes' order; another as it is."""
    if mask.shape[-1] != lengths[rank]:
        return mask
    return RingShard(group, rank, tuple(lengths), None, None).gather(mask, mask.ndim - 1, lengths)


@lru_cache(maxsize=16)  # each layer of each step asks for the same few
def places_of(streams: tuple[int, ...], ranks: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 ``[S]`` twice: of each token in the model's sequence its place in the gathered one, and the inverse.

    Where a model splits text and latents each by itself, a process holds a part of either, and the gathered sequence
    has the first text, the first latents, the second text, and so on. They are kept: nobody may change them.
    """
    with torch.inference_mode(False):  # or a training later in the process could not save them for its backward
        starts = [sum(streams[:n]) for n in range(len(streams))]
        tokens = [start + torch.arange(length) for start, length in zip(starts, streams, strict=True)]
        parts = [token.tensor_split(ranks) for token in tokens]
        back = torch.cat([part[rank] for rank in range(ranks) for part in parts])
        return back.argsort().to(device), back.to(device)


def heads_of_tensor_parallel(config: Any, number: int, total: int | None) -> HeadShard | None:
    """Which heads a call has where diffusers' tensor parallelism shares a layer's weights out; None for all.

    Args:
        config: diffusers' ``ParallelConfig``.
        number: heads of the call.
        total: of the model.
    """
    config = getattr(config, "tensor_parallel_config", None)
    if config is None or total is None or total != number * config._tp_degree:
        return None
    mesh, ranks = config._mesh, config._tp_degree
    group = mesh.get_group()
    return HeadShard(
        mesh.get_local_rank() * number, number, total, lambda own: gather_heads(own, total, ranks, group), ranks
    )


def gather_heads(own: torch.Tensor, total: int, ranks: int, group: Any) -> torch.Tensor:
    """``[B, h, ...]`` of every process to ``[B, total, ...]``; the last may have fewer heads."""
    each = -(-total // ranks)
    padded = own.new_zeros(own.shape[0], each, *own.shape[2:])
    padded[:, : own.shape[1]] = own
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    torch.distributed.all_gather(parts, padded, group=group)
    return torch.cat(parts, 1)[:, :total]
