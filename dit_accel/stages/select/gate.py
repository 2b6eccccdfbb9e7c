"""Key chunks chosen by one threshold for a whole head: VMoBA (arXiv 2506.23858)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...call import AttentionCall
from ...kernels import BlockMask
from ...kernels.common.choice import Case, Choice, Operation
from ...kernels.selection.gate import choose_gate, global_choice, select_by_threshold
from ...plan import LayerMemory, SequenceBlocks
from .pooled import candidates, keep_chosen, pooled_scores_of
from .protocol import Select, check_block, check_share


@dataclass(frozen=True)
class GlobalGate(Select):
    """Rank all (query block, key block) pairs of a head together; keep the best until a share of the gates.

    The gate of a pair is the dot product of mean query and mean key. Per head the gates are scaled to
    [0, 1]; own blocks are always kept, and further pairs, largest first, up to and including the first at
    which the kept gates reach ``threshold`` of their sum. Heads and rows thus differ in density.

    The paper gates every query token on its own and calls the keys' chunks of several hundred tokens; here a
    query block shares one gate, that of its mean query, and a key block is a chunk. See
    :func:`per_query_chunks` for the paper's form.

    Attributes:
        threshold: share of the gates to keep, in (0, 1].
        block: tokens in a query and in a key block.
    """

    threshold: float = 0.25
    block: tuple[int, int] = (128, 64)
    of_call_alone: ClassVar[bool] = True
    goes_round: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("threshold", self.threshold)
        check_block(self.block)

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """The threshold."""
        return {"gate": choose_gate(case, backend)}

    def select(
        self,
        blocks: SequenceBlocks,
        _tables: None,
        call: AttentionCall,
        _memory: LayerMemory | None = None,
    ) -> BlockMask:
        """Mask of one call from its queries and keys."""
        gates = pooled_scores_of(blocks, call, scale=1.0)
        if call.seen is not None:
            # At the least gate of a head, which is a share of nothing, a hidden pair takes no part.
            seen = call.seen.visible
            least = gates.masked_fill(~seen, torch.inf).amin((-1, -2), keepdim=True)
            gates = torch.where(seen, gates, least)
        chosen = select_by_threshold(
            gates,
            self.threshold,
            block_q=blocks.block_q,
            block_k=blocks.block_k,
            seq_len=blocks.layout.seq_len,
            open_k=candidates(blocks, call.key_mask),
            open_q=None if blocks.forced_q is None else ~blocks.forced_q,
            backend=call.backend("gate"),
        )
        return keep_chosen(blocks, chosen, call.key_mask, call.backend("selection"))


def per_query_chunks(q: torch.Tensor, k: torch.Tensor, chunk_of_token: torch.Tensor, threshold: float) -> torch.Tensor:
    """The paper's own form: every query token gates the mean keys of the chunks by itself.

    A reference: the attention it asks for needs a gather per query, which no block kernel can do.

    Args:
        q, k: ``[B, S, H, D]``.
        chunk_of_token: int64 ``[S]``, chunk ``0 .. C - 1`` of each token; no chunk is empty.
        threshold: share of the normalised gates to keep.

    Returns:
        bool ``[B, H, S, C]``: the chunks that each query reads.
    """
    chunks = int(chunk_of_token.max()) + 1
    member = torch.nn.functional.one_hot(chunk_of_token, chunks).double()
    means = torch.einsum("bshd,sc->bhcd", k.double(), member) / member.sum(0)[:, None]
    gates = torch.einsum("bshd,bhcd->bhsc", q.double(), means)
    own = member.bool().expand(gates.shape)
    return global_choice(gates, torch.ones_like(own), own, threshold)
