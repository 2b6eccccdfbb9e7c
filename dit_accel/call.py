"""An attention call as the engine and its stages see it, and how one is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .heads import HeadShard
from .kernels.common.choice import Choice, Operation
from .kernels.common.launch import is_captured
from .kernels.common.scale import scale_of
from .kernels.common.tokens import gather_rows
from .kernels.mask.pairs import PairMask
from .layout import StepContext, TokenLayout
from .plan import AttentionPlan, LeftOut
from .records import BackendsUsed
from .ring import RingPart, RingShard
from .run import Kept, Run


class AttentionInputs(NamedTuple):
    """What a transformer gives one attention: tensors (B, S, H, D) after norms and rotary embedding.

    Attributes:
        attn_mask: as given to the model's own attention.
        scale: of the logits; ``D ** -0.5`` if None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    attn_mask: torch.Tensor | None = None
    scale: float | None = None


@dataclass(eq=False, slots=True)
class AttentionCall:
    """One attention call: tensors (B, S, H, D) after norms and rotary embedding.

    Attributes:
        layer: index of the self-attention layer.
        step: where the call sits in the trajectory.
        key_mask: bool ``[B, S]``, False for hidden keys; None where all are visible or ``pairs`` says which are.
        scale: of the logits.
        layout: of the sequence, or the reason why there is none.
        run: the run that keeps its plans.
        used: kept plan of each layer that its forward used: written, or read when the call is repeated.
        repeated: whether a forward is repeated for its gradients: the call then uses what ``used`` holds, keeps
            nothing and is not counted.
        pairs: bool ``[B|1, H|1, S, S]``, which key (last) each query sees, where not all see the same.
        seen: ``pairs`` cut into the blocks of a plan, while the plan is made.
        unread: why its attention mask cannot be read; such a call stays dense.
        gate: ``[B, n, H, D]``, what a learned gate made of the layer's input, around a ring of the tokens of this
            process' slots; None where there is none.
        router: what a learned selection has in this layer; None where there is none.
        heads: which heads of the layer these are, where several processes share them; None for all.
        ring: which tokens of the sequence these are, where several processes share them; None for all.
        part: which slots of the permuted sequence, once tokens were exchanged; the key mask stays that of the whole.
        left_out: what the plan left out of the run's last dense step, where a compensation asks; None before it.
        plan: what a sparse call ran; None for a dense one.
        dense_reason: why it stayed dense; None for a sparse one.
        choices: the backend of each of the recipe's operations; None outside an engine, where each chooses by itself.
        backends_used: where the backends that ran are recorded; None outside an engine.
        captured: it goes into a CUDA graph, whose replays compute it.
        kept: what its run keeps for it, once that was looked up; see :func:`~dit_accel.kept_plans.kept_of`.
    """

    layer: int
    step: StepContext
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key_mask: torch.Tensor | None
    scale: float
    layout: TokenLayout | str
    run: Run = field(default_factory=Run)
    used: dict[int, Any] = field(default_factory=dict)
    repeated: bool = False
    pairs: torch.Tensor | None = None
    seen: PairMask | None = None
    unread: str | None = None
    gate: torch.Tensor | None = None
    router: Callable[..., torch.Tensor] | None = None
    heads: HeadShard | None = None
    ring: RingShard | None = None
    part: RingPart | None = None
    left_out: LeftOut | None = None
    plan: AttentionPlan | None = None
    dense_reason: str | None = None
    choices: Mapping[Operation, Choice] | None = None
    backends_used: BackendsUsed | None = None
    captured: bool = False
    kept: Kept | None = None

    @classmethod
    def of(
        cls,
        layer: int,
        inputs: AttentionInputs,
        layout: TokenLayout | str,
        step: StepContext,
        run: Run,
        used: dict[int, Any] | None = None,
        repeated: bool = False,
        ring: RingShard | None = None,
    ) -> AttentionCall:
        """The call of these inputs, its mask read and its scale known; the mask is of the whole sequence."""
        q, k, v, attn_mask, scale = inputs
        seq_len = k.shape[1] if ring is None else ring.total
        key_mask, pairs, unread = (None, None, None) if attn_mask is None else _read_mask(attn_mask, q, seq_len)
        if ring is not None and pairs is not None:
            unread = "a mask of token pairs under ring attention"
        used = {} if used is None else used
        scale = scale_of(q, scale)
        call = cls(
            layer, step, q, k, v, key_mask, scale, layout, run, used, repeated, pairs, unread=unread, ring=ring
        )  # fmt: skip
        call.captured = is_captured(q.device)
        return call

    @property
    def mask(self) -> torch.Tensor | None:
        """What hides keys: the key mask or the mask of pairs; None where nothing does."""
        return self.key_mask if self.pairs is None else self.pairs

    @property
    def is_counted(self) -> bool:
        """Whether it stands in the records: a repeated call was counted, and a captured one computes nothing yet."""
        return not (self.repeated or self.captured)

    @property
    def hidden_blocks(self) -> torch.Tensor | None:
        """bool ``[B|1, H|1, nq, nk]``: while a plan is made, blocks of which no query sees a key; else None."""
        return None if self.seen is None else ~self.seen.visible

    def with_keys(self, keys: torch.Tensor | None) -> AttentionCall:
        """The call with each token's key and value replaced by those of the token that ``keys`` has in its place."""
        if keys is None:
            return self
        k, v = (gather_rows(x, keys).transpose(1, 2) for x in (self.k, self.v))
        return replace(self, k=k, v=v)

    def repeat_heads(self) -> None:
        """Give each query head keys and values of its own (grouped-query attention: consecutive heads share them)."""
        groups = self.q.shape[2] // self.k.shape[2]
        if groups > 1:
            self.k, self.v = (x.repeat_interleave(groups, dim=2) for x in (self.k, self.v))

    def spread_queries(self) -> None:
        """Give queries their places among the keys, where others of these have none: zeros, which nobody reads."""
        if isinstance(self.layout, str) or self.layout.queries is None:
            return
        first, number = self.layout.queries
        behind = self.k.shape[1] - first - number
        self.q = F.pad(self.q, (0, 0, 0, 0, first, behind))
        if self.pairs is not None and self.pairs.shape[2] == number:
            self.pairs, self.kept = F.pad(self.pairs, (0, 0, first, behind)), None

    def pad(self, count: int, visible: torch.Tensor) -> None:
        """Put tokens of padding behind all others: zeros, which nobody sees.

        Args:
            count: of tokens.
            visible: bool ``[B, S + count]``, False for the padding alone; the key mask where the call has none.
        """
        assert isinstance(self.layout, TokenLayout)
        self.layout, self.kept = self.layout.padded(count), None
        if self.ring is None:  # around which no process has them, until tokens come to their slots
            self.q, self.k, self.v = (F.pad(x, (0, 0, 0, 0, 0, count)) for x in (self.q, self.k, self.v))
        if self.pairs is not None:
            self.pairs = F.pad(self.pairs, (0, count, 0, count))
        else:
            self.key_mask = visible if self.key_mask is None else F.pad(self.key_mask, (0, count))

    def deal(self, part: RingPart) -> None:
        """Exchange tokens with the other processes of a ring for those of this process' slots. All must call it."""
        self.part = part
        self.k, self.v = part.keys.there_together(self.k, self.v)
        self.q = part.queries.there(self.q)

    def take_gate(self, gate: torch.Tensor) -> None:
        """Take what a learned gate made of this process' tokens. All that share the tokens must call it."""
        self.gate = gate if self.part is None else self.part.queries.there(gate)

    def of_queries(self, out: torch.Tensor) -> torch.Tensor:
        """The output ``[B, S, H, D]`` of the tokens that query, where the model left them, without padding."""
        if self.part is not None:
            return self.part.queries.back(out)  # in which no padding comes along
        if isinstance(self.layout, str):
            return out
        if self.layout.padding:
            out = out[:, : -self.layout.padding]
        if self.layout.queries is None:
            return out
        first, number = self.layout.queries
        return out[:, first : first + number]

    def of_all(self, own: torch.Tensor) -> torch.Tensor:
        """``own [n]`` summed over the processes that share this call; all must call it, and all get the same."""
        if self.heads is not None:
            own = self.heads.of_ranks(own).sum(0)
        if self.part is not None:
            own = self.part.ring.gather(own[None], 0, [1] * self.part.ring.size).sum(0)
        return own

    def backend(self, operation: Operation) -> str:
        """The name of the backend that an operation of this call runs on, recorded as used."""
        if self.choices is None:
            return "auto"
        choice = self.choices[operation]
        if self.backends_used is not None:
            self.backends_used.add(operation, choice)
        return choice.name


def autocast_done(call: AttentionCall) -> AbstractContextManager[None]:
    """Cast the call as autocast would for an attention kernel, and no autocast inside: plans stay exact."""
    device = call.q.device.type
    if not torch.is_autocast_enabled(device) or call.q.dtype == torch.float64:
        return _NO_AUTOCAST
    return _autocast_done(call, device)


_NO_AUTOCAST = nullcontext()


@contextmanager
def _autocast_done(call: AttentionCall, device: str) -> Iterator[None]:
    dtype = torch.get_autocast_dtype(device)
    call.q, call.k, call.v = call.q.to(dtype), call.k.to(dtype), call.v.to(dtype)
    with torch.autocast(device, enabled=False):
        yield


def dtype_of_attention(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which autocast has attention of such tensors computed."""
    if not torch.is_autocast_enabled(device.type) or dtype == torch.float64:
        return dtype
    return torch.get_autocast_dtype(device.type)


def _read_mask(
    attn_mask: torch.Tensor, q: torch.Tensor, seq_len: int
) -> tuple[torch.Tensor | None, torch.Tensor | None, str | None]:
    """What an attention mask stands for: a bool ``[B, Sk]`` key mask, a bool ``[B|1, H|1, Sq, Sk]`` mask of pairs, or
    the reason why it is neither."""
    batch, q_len, heads = q.shape[:3]
    if attn_mask.dtype != torch.bool:
        return None, None, f"additive attention mask ({attn_mask.dtype})"
    shape = tuple(attn_mask.shape)
    if len(shape) == 4:
        # One row that heads and queries share is of keys alone, also where it was expanded (PRX up to diffusers 0.36).
        of_heads, of_queries = (shape[axis] == 1 or attn_mask.stride(axis) == 0 for axis in (1, 2))
        if of_heads and of_queries and shape[1] in (1, heads) and shape[2] in (1, q_len):
            attn_mask = attn_mask[:, 0, 0]
    if attn_mask.ndim == 2 and attn_mask.shape[1] == seq_len and attn_mask.shape[0] in (1, batch):
        return attn_mask.expand(batch, seq_len), None, None
    if shape == (q_len, seq_len):
        return None, attn_mask[None, None], None
    if len(shape) == 4 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2:] == (q_len, seq_len):
        return None, attn_mask, None
    return None, None, f"an attention mask of shape {shape} for {batch} x {heads} x {q_len} queries and {seq_len} keys"
