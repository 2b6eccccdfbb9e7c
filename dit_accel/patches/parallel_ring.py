"""Attention whose tokens several processes share: ring attention, alone or with Ulysses, as diffusers' meshes have it.

Each process keeps its queries, and keys go round (arXiv 2310.01889). With Ulysses (a mesh of both: arXiv 2405.07719)
those of one ring place first exchange tokens for heads. diffusers' own ring has all keys at once and one kernel for
them; ours sends each process' keys on while the blocks of a plan that lie there are attended.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..call import AttentionInputs
from ..heads import HeadShard
from ..ring import RingShard
from ..stages.compensate.protocol import Compensation
from .head_exchange import HeadExchange
from .shards import lengths_of, places_of, split, whole_mask

if TYPE_CHECKING:
    from .parallel import SharedCall
    from .session import Session


def attend_around(call: SharedCall) -> torch.Tensor:
    """A call under ring attention, (B, S, H, D): S tokens of this process, all H heads.

    Raises:
        ValueError: the heads cannot be shared evenly, or the recipe's parts cannot be shared at all.
    """
    session, layer, config, dense = call.session, call.layer, call.config, call.dense
    if session.engine.recipe.select.is_dense:
        return session.pass_by(layer, "recipe is dense", dense)
    _refuse(session)
    q, k, v, attn_mask, scale = call.inputs
    tokens, ranks = q.shape[1], config.ring_degree * config.ulysses_degree
    everyone = config._flattened_mesh.get_group()
    lengths = lengths_of(tokens, ranks, getattr(config, "ring_anything", False), everyone)
    total = sum(lengths)
    streams = call.streams(total)
    if isinstance(streams, str):
        return session.pass_by(layer, streams, dense)
    rank = config._ring_local_rank * config.ulysses_degree + config._ulysses_local_rank
    own = tuple(split(stream, ranks)[rank] for stream in streams)
    if sum(own) != tokens:
        reason = f"{tokens} of {total} tokens in this process are no equal part of text and latents"
        return session.pass_by(layer, reason, dense)
    if attn_mask is not None:
        if attn_mask.ndim > 1 and attn_mask.shape[-2] not in (1, attn_mask.shape[0]):
            return session.pass_by(layer, "a mask of token pairs under ring attention", dense)
        attn_mask = whole_mask(attn_mask, lengths, rank, everyone)
    places = None if len(streams) == 1 else places_of(tuple(streams), ranks, torch.device("cpu"))[0]
    exchange = HeadExchange(config, q.shape[2]) if config.ulysses_degree > 1 else None
    if exchange is not None:
        q, k, v = (exchange.there(x) for x in (q, k, v))
    learned = call.learned
    if learned and session.engine.recipe.compensate.reads_input:
        learned = [_gate_of_tokens(gate, tokens, own, int(session.family.text_first)) for gate in learned]
        if exchange is not None:
            learned = [exchange.there(gate) for gate in learned]
    each = config.ulysses_degree
    group = config._ring_mesh.get_group()
    ring = RingShard(
        group,
        config._ring_local_rank,
        tuple(sum(lengths[first : first + each]) for first in range(0, ranks, each)),
        places,
        (group, config._ring_local_rank, tuple(lengths), tuple(streams), each),
    )
    shard = None if exchange is None else exchange.shard
    _tell(session, config, shard)

    def of_all_keys() -> torch.Tensor:
        return call.gathered(q, ring.gather_with_gradient(k), ring.gather_with_gradient(v), attn_mask)

    ordered = attn_mask
    if attn_mask is not None and places is not None:
        ordered = attn_mask[..., places.to(attn_mask.device)]
    out = call.attend(AttentionInputs(q, k, v, ordered, scale), of_all_keys, shard, ring, learned)
    return out if exchange is None else exchange.back(out, tokens)


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
    needs, whole = None, Compensation.whole
    if not planner.goes_round:
        needs, whole = f"select {type(recipe.select).__name__}", recipe.select.needs_whole
    elif recipe.order.follows_call:
        needs = f"order {type(recipe.order).__name__}"
    elif not recipe.compensate.goes_round:
        needs, whole = f"compensate {type(recipe.compensate).__name__}", recipe.compensate.whole
    if needs is not None:
        raise ValueError(
            f"{needs} {whole}, which ring attention shares out: use ulysses_degree in place of ring_degree, or another "
            "recipe."
        )


def _gate_of_tokens(gate: torch.Tensor, tokens: int, own: tuple[int, ...], latents: int) -> torch.Tensor:
    """What a learned gate made of this process' tokens ``[B, s, H, D]``, zero where it has seen the latents alone.

    Args:
        gate: of all of them, or of the latents.
        tokens: s.
        own: of them, of each stream.
        latents: which stream these are.

    Raises:
        ValueError: it is of others.
    """
    if gate.shape[1] == tokens:
        return gate
    if len(own) == 1 or gate.shape[1] != own[latents]:
        raise ValueError(
            f"The layer's input has {gate.shape[1]} tokens here; a gate needs all {tokens} of this process, or their "
            "latents."
        )
    return F.pad(gate, (0, 0, 0, 0, sum(own[:latents]), sum(own[latents + 1 :])))
