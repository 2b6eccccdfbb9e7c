"""A sequence whose tokens several processes share: which slots each attends, and how tokens come there and back.

Ring attention (arXiv 2310.01889): each process keeps its queries, and keys and values go round. Blocks of a permuted
sequence hold tokens of several processes, so that tokens first go to the process that attends their block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, eq=False)
class RingShard:
    """The tokens that this process holds, of a sequence whose others the ring's other processes hold.

    Attributes:
        group: of the ring.
        rank: of this process in it.
        lengths: tokens of each process.
        places: int64 ``[S]`` on the CPU: of each token in the model's order its place when the processes' tokens follow
            each other; None where these are the same.
        key: what tells one such shard from another.
    """

    group: Any
    rank: int
    lengths: tuple[int, ...]
    places: torch.Tensor | None
    key: Any

    @property
    def size(self) -> int:
        """Processes around the ring."""
        return len(self.lengths)

    @property
    def total(self) -> int:
        """Tokens of the whole sequence."""
        return sum(self.lengths)

    def gather(self, own: torch.Tensor, dim: int, lengths: Sequence[int]) -> torch.Tensor:
        """Every process' part along ``dim``, one after another; process ``r`` has ``lengths[r]``. All must call it."""
        longest, padded = max(lengths), own.contiguous()
        if own.shape[dim] < longest:  # nobody reads what stands behind
            padded = own.new_empty(*own.shape[:dim], longest, *own.shape[dim + 1 :])
            padded.narrow(dim, 0, own.shape[dim]).copy_(own)
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part.narrow(dim, 0, length) for part, length in zip(parts, lengths, strict=True)], dim)

    def gather_with_gradient(
        self, own: torch.Tensor, dim: int = 1, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        """:meth:`gather`, of tokens ``[B, s, H, D]`` if nothing else is said, with a gradient. All must call it."""
        out: torch.Tensor = _Gather.apply(own, self, dim, self.lengths if lengths is None else lengths)
        return out

    def send(self, own: Sequence[torch.Tensor], tokens: int) -> Passing:
        """Begin to send tensors ``[B, s, H, D]`` to the next process, and to receive as many of ``tokens`` tokens each
        from the one before. They go as they are: put together they would be written once more."""
        sent = [x.contiguous() for x in own]
        received = [x.new_empty(x.shape[0], tokens, *x.shape[2:]) for x in sent]
        after, before = (dist.get_global_rank(self.group, (self.rank + step) % self.size) for step in (1, -1))
        operations = [dist.P2POp(dist.isend, x, after, self.group, tag) for tag, x in enumerate(sent)]
        operations += [dist.P2POp(dist.irecv, x, before, self.group, tag) for tag, x in enumerate(received)]
        return Passing(sent, received, dist.batch_isend_irecv(operations))

    def holder(self, step: int) -> int:
        """Whose keys are here after ``step`` passings."""
        return (self.rank - step) % self.size


@dataclass(frozen=True, eq=False)
class Passing:
    """Tensors under way around the ring; what is sent must not change before it has arrived."""

    sent: list[torch.Tensor]
    received: list[torch.Tensor]
    works: list[Any]

    def arrived(self) -> list[torch.Tensor]:
        """What came from the process before."""
        for work in self.works:
            work.wait()
        return self.received


class Exchange:
    """Tokens from the processes that hold them to those that attend their slots, and back.

    Args:
        ring: who holds which tokens.
        places: int64 ``[G, S]`` on the CPU: place, in the processes' order, of the token at each slot, or behind all of
            them at a slot of padding, which gets zeros; ``G`` is 1, or the heads where each has an order of its own.
        bounds: process ``r`` attends the slots from ``bounds[r]`` to ``bounds[r + 1]``.
    """

    def __init__(self, ring: RingShard, places: torch.Tensor, bounds: Sequence[int], device: torch.device) -> None:
        self._group = ring.group
        self._orders = places.shape[0]
        self._tokens = ring.lengths[ring.rank]
        self._slots = bounds[ring.rank + 1] - bounds[ring.rank]
        starts = [0, *accumulate(ring.lengths)]
        owner = torch.bucketize(places, torch.tensor(starts[1:]), right=True)
        # A unit is what an order moves as one: a token, or a token's vector of one head.
        unit = (places - starts[ring.rank]) * self._orders + torch.arange(self._orders)[:, None]
        spans = [slice(first, last) for first, last in pairwise(bounds)]
        others = [rank for rank in range(ring.size) if rank != ring.rank]
        owner, unit = owner.T, unit.T  # slot by slot, as units of tokens are counted
        mine, here = (x[spans[ring.rank]].flatten() for x in (owner, unit))
        stays = (mine == ring.rank).nonzero()[:, 0]
        sent = {rank: unit[spans[rank]][owner[spans[rank]] == ring.rank] for rank in others}
        came = {rank: (mine == rank).nonzero()[:, 0] for rank in others}
        self._sent_counts, self._came_counts = (
            [len(parts[rank]) if rank in parts else 0 for rank in range(ring.size)] for parts in (sent, came)
        )
        self._sent, self._came = (torch.cat([parts[rank] for rank in others]).to(device) for parts in (sent, came))
        # What stays is copied in one pass over all; where something else belongs, that pass writes anything.
        local = torch.zeros(self._orders * self._slots, dtype=torch.int64)
        local[stays] = here[stays]
        home = torch.zeros(self._orders * self._tokens, dtype=torch.int64)
        home[here[stays]] = stays
        self._local, self._home = local.to(device), home.to(device)
        padding = (mine == ring.size).nonzero()[:, 0]
        self._padding = padding.to(device) if len(padding) else None
        # Every process decides alike: all look at the whole sequence.
        self.moves = not (
            self._orders == 1 and torch.equal(places[0], torch.arange(places.shape[1])) and list(bounds) == starts
        )
        at = torch.bucketize(torch.arange(places.shape[1]), torch.tensor(bounds[1:]), right=True)
        self._crosses = bool(((owner != at[:, None]) & (owner < ring.size)).any())

    def there(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, s, H, D]`` of this process' tokens to ``[B, n, H, D]`` of its slots. All must call it."""
        return self.there_together(x)[0]

    def there_together(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """:meth:`there` of several, all sent before the first is waited for."""
        if not self.moves:
            return tensors
        found: tuple[torch.Tensor, ...] = _Moved.apply(self, True, *tensors)
        return found

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, n, H, D]`` of this process' slots to ``[B, s, H, D]`` of its tokens. All must call it."""
        if not self.moves:
            return x
        found: tuple[torch.Tensor] = _Moved.apply(self, False, x)
        return found[0]

    def moved(self, outward: bool, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """:meth:`there`, or else :meth:`back`, without a gradient: only what changes hands is packed and sent, and what
        stays is copied meanwhile."""
        goes, comes, stays = (self._sent, self._came, self._local) if outward else (self._came, self._sent, self._home)
        counts = (self._came_counts, self._sent_counts) if outward else (self._sent_counts, self._came_counts)
        units = [self._units(x) for x in tensors]
        coming = [self._begun(x.index_select(0, goes), *counts) for x in units] if self._crosses else []
        found = [x.index_select(0, stays) for x in units]
        for x, (received, work) in zip(found, coming, strict=False):
            work.wait()
            x.index_copy_(0, comes, received)
        if outward and self._padding is not None:
            for x in found:
                x.index_fill_(0, self._padding, 0)
        return [self._tensor(x, like) for x, like in zip(found, tensors, strict=True)]

    def _begun(self, x: torch.Tensor, came: list[int], sent: list[int]) -> tuple[torch.Tensor, Any]:
        received = x.new_empty(sum(came), x.shape[1])
        return received, dist.all_to_all_single(received, x, came, sent, group=self._group, async_op=True)

    def _units(self, x: torch.Tensor) -> torch.Tensor:
        """``[n * orders, W]`` of ``[B, n, H, D]``: tokens, or with an order per head those of each head."""
        batch, tokens, heads, dim = x.shape
        return x.permute(1, 2, 0, 3).reshape(tokens * self._orders, heads // self._orders * batch * dim)

    def _tensor(self, units: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`_units`, contiguous."""
        batch, _, heads, dim = like.shape
        return units.view(-1, heads, batch, dim).permute(2, 0, 1, 3).contiguous()


@dataclass(frozen=True, eq=False)
class RingPart:
    """The blocks of a permuted sequence that each process of a ring attends and keeps keys of.

    Attributes:
        ring: who holds which tokens.
        q_blocks, k_blocks: process ``r`` has blocks from entry ``r`` up to entry ``r + 1``.
        block_q, block_k: tokens in a block.
        queries, keys: the exchanges.
        slots: int ``[S]``, or ``[H, S]`` with an order per head: token at each slot, in the model's order; None for the
            same.
        total: slots of the whole sequence: its tokens, and padding behind them.
    """

    ring: RingShard
    q_blocks: tuple[int, ...]
    k_blocks: tuple[int, ...]
    block_q: int
    block_k: int
    queries: Exchange
    keys: Exchange
    slots: torch.Tensor | None
    total: int

    @classmethod
    def of(
        cls,
        ring: RingShard,
        slots: torch.Tensor | None,
        work: torch.Tensor,
        blocks: tuple[int, int],
        device: torch.device,
        padding: int = 0,
    ) -> RingPart:
        """Share blocks out: keys evenly, queries by work.

        Args:
            slots: token at each slot, int ``[S]`` or ``[H, S]``, or None.
            work: float ``[nq]``: expected work of each query block.
            blocks: tokens in a query and in a key block.
            padding: slots of tokens behind the sequence, which no process has.

        Raises:
            ValueError: there are fewer blocks than processes.
        """
        block_q, block_k = blocks
        total = ring.total + padding
        number_k = -(-total // block_k)
        if min(len(work), number_k) < ring.size:
            raise ValueError(
                f"A sequence of {len(work)} query and {number_k} key blocks cannot be shared by ring_degree="
                f"{ring.size} processes: choose smaller blocks, or ulysses_degree."
            )
        q_blocks, k_blocks = shared_out(work, ring.size), shared_out(torch.ones(number_k), ring.size)
        order = torch.arange(total) if slots is None else slots.long().cpu()
        place = torch.arange(total)
        if ring.places is not None:
            place[: ring.total] = ring.places
        places = place[order].reshape(-1, total)
        queries, keys = (
            Exchange(ring, places, [min(bound * block, total) for bound in bounds], device)
            for bounds, block in ((q_blocks, block_q), (k_blocks, block_k))
        )
        return cls(ring, q_blocks, k_blocks, block_q, block_k, queries, keys, slots, total)

    @cached_property
    def q_counts(self) -> list[int]:
        """Query blocks of each process."""
        return [last - first for first, last in pairwise(self.q_blocks)]

    @cached_property
    def k_counts(self) -> list[int]:
        """Key blocks of each process."""
        return [last - first for first, last in pairwise(self.k_blocks)]

    def q_span(self) -> slice:
        """Query blocks of this process."""
        return slice(self.q_blocks[self.ring.rank], self.q_blocks[self.ring.rank + 1])

    def k_span(self, rank: int) -> slice:
        """Key blocks of a process."""
        return slice(self.k_blocks[rank], self.k_blocks[rank + 1])

    def keys_of(self, rank: int) -> slice:
        """Slots of a process' keys."""
        first, last = (min(bound * self.block_k, self.total) for bound in self.k_blocks[rank : rank + 2])
        return slice(first, last)

    def queries_here(self) -> slice:
        """Slots of this process' queries."""
        first, last = (min(bound * self.block_q, self.total) for bound in (self.q_span().start, self.q_span().stop))
        return slice(first, last)

    def key_slots(self, rank: int) -> int:
        """How many keys a process has."""
        span = self.keys_of(rank)
        return span.stop - span.start

    def around(self, *own: torch.Tensor) -> Iterator[tuple[int, Sequence[torch.Tensor]]]:
        """Rank and what each process has of ``own``, ``[B, n, H, D]`` of its keys; this one's first. Each is sent on
        before it is used."""
        held: Sequence[torch.Tensor] = own
        for step in range(self.ring.size):
            passing = None
            if step + 1 < self.ring.size:
                passing = self.ring.send(held, self.key_slots(self.ring.holder(step + 1)))
            yield self.ring.holder(step), held
            if passing is not None:
                held = passing.arrived()

    def key_mask_of(self, rank: int, key_mask: torch.Tensor | None) -> torch.Tensor | None:
        """Which keys of a process are visible, bool ``[B, n]`` from ``[B, S]`` in the model's order; where heads share
        an order."""
        return self.mask_at(self.keys_of(rank), key_mask)

    def mask_at(self, span: slice, key_mask: torch.Tensor | None) -> torch.Tensor | None:
        """:meth:`key_mask_of` any slots."""
        if key_mask is None:
            return None
        return (key_mask[:, span] if self.slots is None else key_mask[:, self.slots[span].long()]).contiguous()


def shared_out(work: torch.Tensor, parts: int) -> tuple[int, ...]:
    """Bounds of ``parts`` runs of ``work [n]`` with about the same sum each, and one entry at least."""
    sums = torch.cat([work.new_zeros(1), work.cumsum(0)]).double()
    bounds = [0]
    for part in range(1, parts):
        nearest = int((sums - sums[-1] * part / parts).abs().argmin())
        bounds.append(min(max(nearest, bounds[-1] + 1), len(work) - parts + part))
    return (*bounds, len(work))


class _Moved(torch.autograd.Function):
    """Each token is at one slot: the gradient of an exchange is the other one."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, outward: bool, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.exchange, ctx.outward = exchange, outward
        return tuple(exchange.moved(outward, tensors))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return None, None, *_Moved.apply(ctx.exchange, not ctx.outward, *grads)


# Of each tensor of an exchange, rows that come from each process and rows that it is sent.
Counts = Sequence[tuple[list[int], list[int]]]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, counts: Counts, group: Any, *xs: torch.Tensor) -> torch.Tensor:
        ctx.counts, ctx.group = counts, group
        numbers = [sum(came) for came, _ in counts]
        out = xs[0].new_empty(sum(numbers), *xs[0].shape[1:])
        for part, x, (came, sent) in zip(out.split(numbers), xs, counts, strict=True):
            dist.all_to_all_single(part, x.contiguous(), came, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        grads = grad.split([sum(came) for came, _ in ctx.counts])
        found = (
            _AllToAll.apply(((sent, came),), ctx.group, part)
            for part, (came, sent) in zip(grads, ctx.counts, strict=True)
        )
        return None, None, *found


def all_to_all(xs: Sequence[torch.Tensor], counts: Counts, group: Any) -> torch.Tensor:
    """Rows of each of ``xs`` for those of the other processes, one exchange behind the other; with gradients.

    Args:
        xs: ``[n, ...]``, rows for each process in turn.
        counts: of each how many come, and how many are sent.

    Returns:
        What came, in the order of ``xs`` and then of the processes.
    """
    out: torch.Tensor = _AllToAll.apply(tuple(counts), group, *xs)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, ring: RingShard, dim: int, lengths: Sequence[int]) -> torch.Tensor:
        ctx.ring, ctx.dim, ctx.lengths = ring, dim, lengths
        return ring.gather(own, dim, lengths)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        ring: RingShard = ctx.ring
        # Every process has gradients of all of it, each of its own queries.
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ring.group)
        first, number = sum(ctx.lengths[: ring.rank]), ctx.lengths[ring.rank]
        return grad.narrow(ctx.dim, first, number), None, None, None
