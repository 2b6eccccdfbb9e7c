"""Linear attention over the key blocks left out, through learned parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...call import AttentionCall
from ...kernels import BlockMask
from ...kernels.common.choice import Case, Choice, Operation, case_of
from ...kernels.linear.api import add_linear_branch, choose_linear, linear_branch, plus_linear_branch
from ...kernels.linear.projection import project_heads
from ...kernels.selection.api import select_blocks
from ...plan import AttentionPlan, LayerMemory, SequenceBlocks
from ...ring_attention import mask_of_own_keys
from ...ring_sums import RingBlockSums, RingSums
from ..select.means import own_key_mask
from ..select.pooled import pooled_scores_of
from .learned import LearnedCompensation
from .protocol import Compensation

FEATURE_MAPS = ("softmax", "elu", "relu", "hedgehog")
FORMS = ("paper", "non_critical", "all_tokens")
# Of the released code that sums over all tokens.
ALL_TOKENS_EPS = 1e-5


@dataclass(frozen=True)
class LinearBranch(Compensation):
    """Linear attention over left-out blocks, through a learned projection (SLA, arXiv 2509.24006).

    ``out = sparse + projection(phi(q) H / (phi(q) . Z))`` with ``H`` and ``Z`` the sums of ``phi(k)^T v`` and
    ``phi(k)`` over the blocks that the branch takes. The projection, D to D, is shared by the heads of a
    layer, kept in float32 and zero at the start: an untrained branch adds nothing.

    Attributes:
        form: "paper": marginal blocks, neither critical (selected) nor negligible; "non_critical": all blocks
            that are not selected (the released SLA-1); "all_tokens": all tokens, selected or not, with 1e-5
            added to the denominator (the released main branch and TurboDiffusion).
        feature_map: phi: "softmax" over the features, "elu" (plus one), "relu", or "hedgehog" (softmax of a
            learned map and of its negative, arXiv 2402.04347; runs without a Triton kernel).
        negligible_share: share of the latent key blocks, those of lowest pooled score, that a query block
            neglects; for the paper's form only.
    """

    form: str = "paper"
    feature_map: str = "softmax"
    negligible_share: float = 0.1

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"compensate.form must be one of {', '.join(FORMS)}, got {self.form!r}.")
        if self.feature_map not in FEATURE_MAPS:
            raise ValueError(
                f"compensate.feature_map must be one of {', '.join(FEATURE_MAPS)}, got {self.feature_map!r}."
            )
        if not 0.0 <= self.negligible_share < 1.0:
            raise ValueError(f"compensate.negligible_share must lie in [0, 1), got {self.negligible_share}.")

    is_learned: ClassVar[bool] = True
    goes_round: ClassVar[bool] = True

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """The branch."""
        blocks = None if self.form == "all_tokens" else case.blocks
        return {"linear_branch": choose_linear(case._replace(blocks=blocks), self.feature_map, backend)}

    def prepare(
        self,
        blocks: SequenceBlocks,
        _mask: BlockMask,
        call: AttentionCall,
        _memory: LayerMemory | None = None,
    ) -> BlockMask | None:
        """The negligible blocks, those latent ones of lowest score; None in the released forms."""
        if self.form != "paper" or self.negligible_share == 0.0:
            return None
        # Pooled anew rather than taken from the selection, so that any selection will do; smoothing the keys
        # would shift a row's scores alike and leave the ranking as it is.
        scores = pooled_scores_of(blocks, call, call.scale)
        _, outside = (None, None) if call.key_mask is None else blocks.hidden_k(call.key_mask)
        if blocks.forced_k is not None:
            outside = blocks.forced_k if outside is None else outside | blocks.forced_k
        lowest = select_blocks(
            -scores,
            density=self.negligible_share,
            empty_k=outside,
            keep_own=False,
            block_q=blocks.block_q,
            block_k=blocks.block_k,
            q_len=blocks.layout.seq_len,
            kv_len=blocks.layout.seq_len,
            backend=call.backend("selection"),
        )
        # A backward keeps the lists; past a row's share (one more, for its rounding) there is nothing in them.
        width = min(scores.shape[-1], math.ceil(self.negligible_share * scores.shape[-1]) + 1)
        return replace(lowest, kv_indices=lowest.kv_indices[..., :width].contiguous())

    def build(self, heads: int, head_dim: int) -> LearnedCompensation:
        """The projection of one layer, zero, and hedgehog's maps, the identity."""
        return LinearBranchLayer(self, heads, head_dim)


class LinearBranchLayer(LearnedCompensation):
    """The learned part of :class:`LinearBranch` for one attention layer.

    Parameters ``weight [D, D]`` and ``bias [D]`` of the projection; for hedgehog also ``feature_q`` and
    ``feature_k [H, D, D]``. They are the module's own, not a child's, so that offloading hooks, which act on
    a module's forward, bring them to the device.
    """

    def __init__(self, choice: LinearBranch, heads: int, head_dim: int) -> None:
        super().__init__()
        self.choice = choice
        self.weight = nn.Parameter(torch.zeros(head_dim, head_dim))
        self.bias = nn.Parameter(torch.zeros(head_dim))
        if choice.feature_map == "hedgehog":
            identity = torch.eye(head_dim).repeat(heads, 1, 1)
            self.feature_q = nn.Parameter(identity)
            self.feature_k = nn.Parameter(identity.clone())

    def per_head(self) -> tuple[str, ...]:
        return ("feature_q", "feature_k") if self.choice.feature_map == "hedgehog" else ()

    def forward(self, out: torch.Tensor, call: AttentionCall, plan: AttentionPlan) -> torch.Tensor:
        """See :meth:`LearnedCompensation.forward`; ``out`` may be changed in place without gradients."""
        q, k, v, key_mask = call.q, call.k, call.v, own_key_mask(call)
        backend = call.backend("linear_branch")
        everything = self.choice.form == "all_tokens"
        critical = None if everything or call.part is not None else plan.mask
        negligible, rows, eps = plan.compensation, plan.rows, 0.0
        if everything:
            # The sum over all tokens knows no order and no blocks.
            negligible, rows, eps = None, None, ALL_TOKENS_EPS
        shared = None
        if call.part is not None:
            # Its tokens have come to their slots; of keys there are this process' alone.
            rows, shared = None, (RingSums if everything else RingBlockSums)(call.part)
            lowest, shares = negligible, plan.shares
            blocks, others = (None, None) if shares is None else (shares.blocks, shares.negligible)
            critical = None if everything else mask_of_own_keys(call, blocks, lambda: plan.mask)
            negligible = None if lowest is None else mask_of_own_keys(call, others, lambda: lowest)
        options: dict[str, Any] = {
            "negligible": negligible,
            "feature_map": self.choice.feature_map,
            "rows": rows,
            "key_mask": key_mask,
            "eps": eps,
            "backend": backend,
            "shared": shared,
        }
        maps = (self.feature_q, self.feature_k) if self.choice.feature_map == "hedgehog" else ()
        recorded = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (out, q, k, v, self.weight, self.bias, *maps)
        )
        if not recorded:
            q, k = _mapped(q, k, key_mask, *maps)
            return add_linear_branch(out, q, k, v, critical, self.weight, self.bias, **options)
        if choose_linear(case_of(q, mask=critical), self.choice.feature_map, backend).name == "triton":
            return plus_linear_branch(out, q, k, v, critical, self.weight, self.bias, **options)

        def projected(
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor,
            *maps: torch.Tensor,
        ) -> torch.Tensor:
            q, k = _mapped(q, k, key_mask, *maps)
            branch = linear_branch(q, k, v, critical, **options)
            # In the activations' dtype, as the inference kernel does.
            return project_heads(branch, weight, bias)

        # Without a kernel's backward the branch is computed again: kept for the projection's gradient it would be
        # half as large again as dense attention's output. Parameters are arguments, since a functional call takes
        # its own back before the backward.
        return out + checkpoint(
            projected, q, k, v, self.weight, self.bias, *maps, use_reentrant=False, preserve_rng_state=False
        )


def _mapped(
    q: torch.Tensor, k: torch.Tensor, key_mask: torch.Tensor | None, *maps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys through hedgehog's maps, where there are any."""
    if not maps:
        return q, k
    if key_mask is not None:
        # A padded prompt may hold anything, and the map's gradient reads every key.
        k = k.masked_fill(~key_mask[..., None, None], 0)
    return _per_head(q, maps[0]), _per_head(k, maps[1])


def _per_head(x: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """(B, S, H, D) mapped by ``[H, D, D]`` (out, in), in x's dtype."""
    return torch.einsum("bshd,hed->bshe", x.to(maps.dtype), maps).to(x.dtype)
