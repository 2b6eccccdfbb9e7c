"""Attention that several processes share; here by heads: Ulysses, as diffusers' context parallelism has it.

Each process holds a part of the sequence. Queries, keys and values are exchanged so that each process has the whole
sequence of some heads, attends, and exchanges the output back (arXiv 2309.14509). A plan of a head needs that head's
queries and keys alone, so our call stands between the two exchanges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..call import AttentionInputs
from ..heads import HeadShard
from ..ring import RingShard
from .ambient import LatentTokens
from .forwards import in_backward
from .head_exchange import HeadExchange
from .parallel_ring import attend_around
from .reasons import PARALLEL_UNKNOWN
from .shards import places_of, split, whole_mask

if TYPE_CHECKING:
    from .session import Session

# The model's own attention of gathered queries, keys, values and mask, as diffusers has it in one process.
Gathered = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]


def why_not_parallel(parallel_config: Any) -> str | None:
    """Why a call under context parallelism cannot be taken: one of the seam's reasons, or None."""
    config = getattr(parallel_config, "context_parallel_config", None)
    if config is None:
        return PARALLEL_UNKNOWN
    return None


@dataclass(frozen=True, eq=False)
class SharedCall:
    """One intercepted call under context parallelism, of tensors (B, S, H, D): S tokens of this process, all H heads.

    Attributes:
        session, layer: whose call it is.
        inputs: of this process' tokens.
        config: diffusers' ``ContextParallelConfig``.
        gathered: the model's own attention of this process' heads, over the whole sequence.
        dense: the model's own attention with its exchanges.
        learned: what a graph hands in, or what a gate made of the layer's input; see
            :meth:`dit_accel.engine.Engine.attend`.
        served: the call that is repeated for the gradients of compiled code: its forward, and which of the layer's
            calls it is; None for any other.
    """

    session: Session
    layer: int
    inputs: AttentionInputs
    config: Any
    gathered: Gathered
    dense: Callable[[], torch.Tensor]
    learned: Sequence[torch.Tensor] | None = None
    served: tuple[int, int] | None = None

    def streams(self, seq_len: int) -> tuple[int, ...] | str:
        """See :meth:`dit_accel.patches.session.Session.streams`."""
        number = None if self.served is None else self.served[0]
        return self.session.streams(self.layer, seq_len, self.inputs.attn_mask is not None, number)

    def attend(
        self,
        inputs: AttentionInputs,
        dense: Callable[[], torch.Tensor],
        heads: HeadShard | None,
        ring: RingShard | None = None,
        learned: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """What is left to attend once tokens were exchanged."""
        if self.served is not None:
            return self.session.repeat(*self.served, self.layer, inputs, dense, learned, heads, ring)
        return self.session.attend(self.layer, inputs, None, dense, learned, heads, ring)


def attend_in_parallel(call: SharedCall, latents: LatentTokens | None = None) -> torch.Tensor:
    """A call under context parallelism, (B, S, H, D): S tokens of this process, all H heads.

    Args:
        call: what is attended.
        latents: what a graph of the whole transformer holds; else None.

    Raises:
        ValueError: the heads cannot be shared evenly, or the recipe's parts cannot be shared at all.
    """
    session = call.session
    if not session.engine.switched_on and session.engine.output_tap is None:
        return call.dense()
    attend = attend_around if call.config.ring_degree > 1 else _attend
    if in_backward():  # no forward is under way whose end would be told
        return attend(call)
    if latents is not None:
        session.enter_traced(call.layer, latents)
    watch = session.watch_others()
    try:
        return attend(call)
    except BaseException as error:
        explained = watch.explained(error)
        if latents is not None:  # the end of a graph of the whole transformer is announced by nobody
            watch.leave(explained)
        if explained is error:
            raise
        raise explained from error


def _attend(call: SharedCall) -> torch.Tensor:
    q, k, attn_mask = call.inputs.q, call.inputs.k, call.inputs.attn_mask
    exchange, tokens = HeadExchange(call.config, q.shape[2]), q.shape[1]
    seq_len = sum(exchange.lengths(k.shape[1]))
    _tell(call.session, exchange.shard)
    if attn_mask is not None:
        attn_mask = whole_mask(attn_mask, exchange.lengths(k.shape[1]), exchange.rank, exchange.group)
    streams = _streams(call, exchange, seq_len, tokens)
    # Behind it queries, keys and values of the whole sequence are gone, and the way back has their memory.
    out = _of_own_heads(call, exchange, streams, attn_mask)
    return exchange.back(out, tokens, None if isinstance(streams, str) else streams)


def _of_own_heads(
    call: SharedCall, exchange: HeadExchange, streams: list[list[int]] | str, attn_mask: torch.Tensor | None
) -> torch.Tensor:
    """``[B, S, h, D]`` of this process' heads, in the order of ``streams``, or as the processes have them where that is
    a reason."""
    session, tokens = call.session, call.inputs.q.shape[1]
    if isinstance(streams, str):
        q, k, v = (exchange.there(x) for x in call.inputs[:3])
        return session.pass_by(call.layer, streams, lambda: call.gathered(q, k, v, attn_mask))
    q, k, v = (exchange.there(x, streams) for x in call.inputs[:3])
    learned = call.learned
    if learned and session.engine.recipe.compensate.reads_input:
        # A gate may be of the latents alone.
        learned = [exchange.there(gate, streams if gate.shape[1] == tokens else None) for gate in learned]
    mask = attn_mask
    if len(streams) == 1:

        def dense() -> torch.Tensor:
            return call.gathered(q, k, v, attn_mask)

    else:
        there, back = places_of(tuple(map(sum, streams)), exchange.ranks, q.device)
        if attn_mask is not None:
            mask = attn_mask[..., there.to(attn_mask.device)]

        def dense() -> torch.Tensor:
            # The model's own attention sees the tokens as the processes have them, so that it is the same to the bit.
            return call.gathered(q[:, back], k[:, back], v[:, back], attn_mask)[:, there]

    given = AttentionInputs(q, k, v, mask, call.inputs.scale)
    return call.attend(given, dense, exchange.shard, learned=learned)


def _streams(call: SharedCall, exchange: HeadExchange, seq_len: int, tokens: int) -> list[list[int]] | str:
    """Tokens of each process, of each stream that is split by itself, in the model's order; else the reason why that
    is not known.
    """
    attn_mask = call.inputs.attn_mask
    streams = call.streams(seq_len)
    if isinstance(streams, str):
        return streams
    lengths = [split(stream, exchange.ranks) for stream in streams]
    if sum(stream[exchange.rank] for stream in lengths) != tokens:
        return f"{tokens} of {seq_len} tokens in this process are no equal part of text and latents"
    if len(streams) == 1:
        return [exchange.lengths(tokens)]
    if attn_mask is not None and attn_mask.ndim > 1 and attn_mask.shape[-2] not in (1, attn_mask.shape[0]):
        return "a mask of token pairs under context parallelism of text and latents"
    return lengths


def _tell(session: Session, shard: HeadShard) -> None:
    session.engine.parallel[
        f"context parallel: Ulysses over {shard.ranks} ranks, this rank's heads {shard.first} to "
        f"{shard.first + shard.number - 1} of {shard.total}"
    ] = None
