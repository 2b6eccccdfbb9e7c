"""Attention that several processes share; here by heads: Ulysses, as diffusers' context parallelism has it.

Each process holds a part of the sequence. diffusers exchanges queries, keys and values so that each process has the
whole sequence of some heads, attends, and exchanges the output back (arXiv 2309.14509). A plan of a head needs that
head's queries and keys alone, so our call stands between the two exchanges, which stay diffusers'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..call import AttentionInputs
from ..heads import HeadShard
from .forwards import in_backward
from .parallel_ring import attend_around
from .reasons import PARALLEL_UNKNOWN
from .shards import gather_heads, places_of, split

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


def attend_in_parallel(
    session: Session,
    layer: int,
    inputs: AttentionInputs,
    parallel_config: Any,
    gathered: Gathered,
    dense: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """One intercepted call under context parallelism, (B, S, H, D): S tokens of this process, all H heads.

    Args:
        inputs: of this process' tokens.
        gathered: the model's own attention of this process' heads, over the whole sequence.
        dense: the model's own attention with its exchanges.

    Raises:
        ValueError: the heads cannot be shared evenly, or the recipe's parts cannot be shared at all.
    """
    engine = session.engine
    if not engine.switched_on and engine.output_tap is None:
        return dense()
    if in_backward():
        raise ValueError(
            "A block is repeated inside a backward, as by gradient checkpointing and for the gradients of compiled "
            "code, which context parallelism of a patched model does not know: disable_gradient_checkpointing(), and "
            "train in eager code."
        )
    _refuse(session)
    watch = session.watch_others()
    try:
        return _attend(session, layer, inputs, parallel_config, gathered, dense)
    except RuntimeError as error:
        explained = watch.explained(error)
        if explained is error:
            raise
        raise explained from error


def _attend(
    session: Session,
    layer: int,
    inputs: AttentionInputs,
    parallel_config: Any,
    gathered: Gathered,
    dense: Callable[[], torch.Tensor],
) -> torch.Tensor:
    if parallel_config.context_parallel_config.ring_degree > 1:
        return attend_around(session, layer, inputs, parallel_config.context_parallel_config, gathered, dense)
    from diffusers.models.attention_dispatch import _templated_context_parallel_attention

    shared = _Shared(session, layer, inputs, parallel_config.context_parallel_config, gathered)
    q, k, v, attn_mask, scale = inputs
    return _templated_context_parallel_attention(
        q,
        k,
        v,
        attn_mask,
        scale=scale,
        forward_op=shared.forward,
        backward_op=shared.backward,
        _parallel_config=parallel_config,
    )


class _Shared:
    """One call between the exchanges.

    Args:
        inputs: before them.
        config: diffusers' ``ContextParallelConfig``.
    """

    def __init__(self, session: Session, layer: int, inputs: AttentionInputs, config: Any, gathered: Gathered) -> None:
        self.session = session
        self.layer = layer
        self.scale = inputs.scale
        self.gathered = gathered
        self.local_len, self.total = inputs.q.shape[1:3]
        self.ranks, self.rank = config.ulysses_degree, config._ulysses_local_rank
        self.group = config._ulysses_mesh.get_group()
        if self.total % self.ranks and not getattr(config, "ulysses_anything", False):
            raise ValueError(
                f"{self.total} heads cannot be shared evenly by ulysses_degree={self.ranks} processes: choose a "
                f"divisor of {self.total}, or ulysses_anything=True."
            )

    def forward(
        self,
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        *_options: Any,
        **_more: Any,
    ) -> torch.Tensor:
        """What diffusers calls between the exchanges: ``[B, S, H, D]`` of all tokens and this process' heads."""
        if not any(ctx.needs_input_grad[:3]):
            return self._attend(query, key, value, attn_mask)
        # diffusers' function runs below autograd: what is inside gets a graph of its own.
        with torch.enable_grad():
            query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
            out = self._attend(query, key, value, attn_mask)
        ctx.attended = (query, key, value), out
        return out.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_more: Any) -> tuple[torch.Tensor, ...]:
        """Gradients of what :meth:`forward` was given."""
        leaves, out = ctx.attended
        return torch.autograd.grad(out, leaves, grad)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None
    ) -> torch.Tensor:
        places = self._places(k.shape[1], attn_mask)
        if isinstance(places, str):
            return self.session.pass_by(self.layer, places, lambda: self.gathered(q, k, v, attn_mask))
        heads = self._heads(q.shape[2])
        if places is None:
            inputs = AttentionInputs(q, k, v, attn_mask, self.scale)
            return self.session.attend(self.layer, inputs, None, lambda: self.gathered(q, k, v, attn_mask), heads=heads)
        there, back = (x.to(q.device) for x in places)
        ordered = AttentionInputs(
            q[:, there],
            k[:, there],
            v[:, there],
            None if attn_mask is None else attn_mask[..., there.to(attn_mask.device)],
            self.scale,
        )
        # The model's own attention sees the tokens as they came, so that it is the same to the bit.
        out = self.session.attend(
            self.layer, ordered, None, lambda: self.gathered(q, k, v, attn_mask)[:, there], heads=heads
        )
        return out[:, back]

    def _places(self, seq_len: int, attn_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor] | str | None:
        """Where each token of the model's sequence lies in the gathered one, and the inverse; None where they are the
        same, else the reason why that is not known.
        """
        streams = self.session.streams(self.layer, seq_len, attn_mask is not None)
        if isinstance(streams, str):
            return streams
        lengths = [split(stream, self.ranks) for stream in streams]
        if sum(stream[self.rank] for stream in lengths) != self.local_len:
            return f"{self.local_len} of {seq_len} tokens in this process are no equal part of text and latents"
        if len(streams) == 1:
            return None
        if attn_mask is not None and attn_mask.ndim > 1 and attn_mask.shape[-2] not in (1, attn_mask.shape[0]):
            return "a mask of token pairs under context parallelism of text and latents"
        return places_of(tuple(streams), self.ranks)

    def _heads(self, number: int) -> HeadShard:
        each = -(-self.total // self.ranks)
        shard = HeadShard(
            self.rank * each,
            number,
            self.total,
            lambda own: gather_heads(own, self.total, self.ranks, self.group),
            self.ranks,
        )
        self.session.engine.parallel[
            f"context parallel: Ulysses over {self.ranks} ranks, this rank's heads {shard.first} to "
            f"{shard.first + number - 1} of {self.total}"
        ] = None
        return shard


def _refuse(session: Session) -> None:
    """Raise where a recipe decides or learns for all heads of a layer together."""
    engine = session.engine
    if engine.learned or engine.routers:
        raise ValueError(
            "What a recipe has learned belongs to all heads of a layer, and context parallelism shares them out: "
            "generate in one process, or patch without the compensation."
        )
