"""Attention whose tokens several processes share: ring attention, alone or with Ulysses, as diffusers' meshes have it.

Each process keeps its queries, and keys go round (arXiv 2310.01889). With Ulysses (a mesh of both: arXiv 2405.07719)
those of one ring place first exchange tokens for heads. diffusers' own ring has all keys at once and one kernel for
them; ours sends each process' keys on while the blocks of a plan that lie there are attended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..call import AttentionInputs
from ..heads import HeadShard
from ..ring import RingShard
from .shards import gather_heads, places_of, split

if TYPE_CHECKING:
    from .parallel import Gathered
    from .session import Session


def attend_around(
    session: Session,
    layer: int,
    inputs: AttentionInputs,
    config: Any,
    gathered: Gathered,
    dense: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """One intercepted call under ring attention, (B, S, H, D): S tokens of this process, all H heads.

    Args:
        inputs: of this process' tokens.
        config: diffusers' ``ContextParallelConfig``.
        gathered: the model's own attention of queries to all keys.
        dense: the model's own attention with its exchanges.

    Raises:
        ValueError: the heads cannot be shared evenly, or the recipe's parts cannot be shared at all.
    """
    if session.engine.recipe.select.is_dense:
        return session.pass_by(layer, "recipe is dense", dense)
    _refuse(session)
    q, k, v, attn_mask, scale = inputs
    ranks = config.ring_degree * config.ulysses_degree
    everyone = config._flattened_mesh.get_group()
    lengths = _lengths(q.shape[1], ranks, getattr(config, "ring_anything", False), everyone)
    total = sum(lengths)
    streams = session.streams(layer, total, attn_mask is not None)
    if isinstance(streams, str):
        return session.pass_by(layer, streams, dense)
    rank = config._ring_local_rank * config.ulysses_degree + config._ulysses_local_rank
    if sum(split(stream, ranks)[rank] for stream in streams) != q.shape[1]:
        reason = f"{q.shape[1]} of {total} tokens in this process are no equal part of text and latents"
        return session.pass_by(layer, reason, dense)
    if attn_mask is not None:
        if attn_mask.ndim > 1 and attn_mask.shape[-2] not in (1, attn_mask.shape[0]):
            return session.pass_by(layer, "a mask of token pairs under ring attention", dense)
        attn_mask = _whole_mask(attn_mask, lengths, rank, everyone)
    places = None if len(streams) == 1 else places_of(tuple(streams), ranks)[0]
    shard = None
    if config.ulysses_degree > 1:
        q, k, v = (_exchange(x, config, 2, 1) for x in (q, k, v))
        shard = _heads(inputs.q.shape[2], config)
    each = config.ulysses_degree
    ring = RingShard(
        config._ring_mesh.get_group(),
        config._ring_local_rank,
        tuple(sum(lengths[first : first + each]) for first in range(0, ranks, each)),
        places,
        (config._ring_local_rank, tuple(lengths), tuple(streams), each),
    )
    _tell(session, config, shard)

    def of_all_keys() -> torch.Tensor:
        return gathered(q, ring.gather_with_gradient(k), ring.gather_with_gradient(v), attn_mask)

    ordered = attn_mask
    if attn_mask is not None and places is not None:
        ordered = attn_mask[..., places.to(attn_mask.device)]
    given = AttentionInputs(q, k, v, ordered, scale)
    out = session.attend(layer, given, None, of_all_keys, heads=shard, ring=ring)
    return out if shard is None else _exchange(out, config, 1, 2)


def _lengths(own: int, ranks: int, anything: bool, group: Any) -> list[int]:
    """Tokens of each process; where these may differ they are asked for, as diffusers does in every call."""
    if not anything:
        return [own] * ranks
    from diffusers.models._modeling_parallel import gather_size_by_comm

    return gather_size_by_comm(own, group)


def _whole_mask(mask: torch.Tensor, lengths: list[int], rank: int, group: Any) -> torch.Tensor:
    """A mask of this process' keys as one of all keys, in the processes' order."""
    if mask.shape[-1] != lengths[rank]:
        return mask
    return RingShard(group, rank, tuple(lengths), None, None).gather(mask, mask.ndim - 1, lengths)


def _exchange(x: torch.Tensor, config: Any, scatter: int, gather: int) -> torch.Tensor:
    """Tokens for heads among the processes of a ring place, or back; with gradients."""
    from diffusers.models.attention_dispatch import SeqAllToAllDim

    out: torch.Tensor = SeqAllToAllDim.apply(config._ulysses_mesh.get_group(), x.contiguous(), scatter, gather)
    return out


def _heads(total: int, config: Any) -> HeadShard:
    ranks, rank = config.ulysses_degree, config._ulysses_local_rank
    if total % ranks:
        raise ValueError(
            f"{total} heads cannot be shared evenly by ulysses_degree={ranks} processes: choose a divisor of {total}."
        )
    each, group = total // ranks, config._ulysses_mesh.get_group()
    return HeadShard(rank * each, each, total, lambda own: gather_heads(own, total, ranks, group), ranks)


def _tell(session: Session, config: Any, shard: HeadShard | None) -> None:
    said = f"context parallel: ring of {config.ring_degree}, this is rank {config._ring_local_rank} of it"
    if shard is not None:
        said += (
            f"; Ulysses over {config.ulysses_degree} ranks, this rank's heads {shard.first} to "
            f"{shard.first + shard.number - 1} of {shard.total}"
        )
    session.engine.parallel[said] = None


def _refuse(session: Session) -> None:
    """Raise where a stage of the recipe needs all tokens in one process."""
    recipe, planner = session.engine.recipe, session.engine.planner
    needs = None
    if not planner.goes_round:
        needs = f"select {type(recipe.select).__name__}"
    elif recipe.order.follows_call:
        needs = f"order {type(recipe.order).__name__}"
    elif not recipe.compensate.goes_round:
        needs = f"compensate {type(recipe.compensate).__name__}"
    if needs is not None:
        raise ValueError(
            f"{needs} looks at single tokens of the whole sequence, which ring attention shares out: use "
            "ulysses_degree in place of ring_degree, or another recipe."
        )
