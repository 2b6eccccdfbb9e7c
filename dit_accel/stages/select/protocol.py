"""What a selection offers to the engine."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch

from ...call import AttentionCall
from ...heads import HeadShard
from ...kernels import BlockMask
from ...kernels.common.choice import Case, Choice, Operation
from ...layout import TokenLayout
from ...plan import LayerMemory, SequenceBlocks
from ..learned_layer import LearnedLayer

BLOCK_SIZES = (32, 64, 128)
# Where whole blocks are chosen; token bits come in words of 32 keys.
WHOLE_BLOCK_SIZES = (16, *BLOCK_SIZES)


HeadDensities = tuple[tuple[float, ...], ...]
"""A density per layer, and in it per head; a single layer's entry serves all layers."""


class Select(Protocol):
    """A choice of key blocks for every query block; blocks with other tokens than latents are all kept.

    A kind inherits from this class, and says where it differs from what stands here.

    Attributes:
        is_dense: nothing is chosen: calls go to the model's own attention, untouched.
        is_static: the choice depends on the layout alone.
        has_density: it has a share of blocks to keep, see :meth:`with_density`.
        has_head_densities: it has one per layer and head too.
        is_learned: it has parameters in each layer, see :meth:`build`.
        per_head: static patterns differ by layer and head.
        of_call_alone: the choice is a function of the call's queries, keys and layout and of what stands here: nothing
            is remembered, and nothing waits for the device. A CUDA graph then makes it anew in each replay. A subclass
            must say so itself.
        can_choose_anew: a later step can choose from what a search found, see :meth:`choose_anew`.
        goes_round: it can plan where processes around a ring share the tokens of a call; all come to the same mask. A
            static choice always can.
        needs_whole: what it does with the whole sequence where it cannot, the predicate of a sentence.
    """

    is_dense: ClassVar[bool] = False
    is_static: ClassVar[bool] = False
    has_density: ClassVar[bool] = False
    has_head_densities: ClassVar[bool] = False
    is_learned: ClassVar[bool] = False
    per_head: ClassVar[bool] = False
    of_call_alone: ClassVar[bool] = False
    can_choose_anew: ClassVar[bool] = False
    goes_round: ClassVar[bool] = False
    needs_whole: ClassVar[str] = "looks at single tokens of the whole sequence"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "of_call_alone" not in vars(cls):
            cls.of_call_alone = False

    @property
    def hides_tokens(self) -> bool:
        """Whether single tokens of blocks that are kept may be hidden."""
        return False

    @property
    def block(self) -> tuple[int, int]:
        """Tokens in a query and in a key block."""
        ...

    @property
    def density(self) -> float | None:
        """Share of the latent key blocks to keep, in (0, 1]; None where another rule decides."""
        return None

    @property
    def head_densities(self) -> HeadDensities:
        """In place of :attr:`density`; empty where that holds."""
        return ()

    def with_density(self, density: float) -> Select:
        """The same selection with this density in every layer and head.

        Raises:
            ValueError: it has none.
        """
        raise ValueError(f"{type(self).__name__} has no density to set, got {density}.")

    def of_layer(self, layer: int) -> Select:
        """The selection of one layer.

        Raises:
            ValueError: it is for fewer layers.
        """
        return self

    def prepare(self, blocks: SequenceBlocks) -> Any:
        """What can be worked out once for a layout; given back to :meth:`select` as ``tables``."""
        return None

    def build(self, heads: int, head_dim: int) -> LearnedLayer:
        """The learned part of one layer, which :meth:`select` finds at the call's ``router``."""
        raise TypeError(f"{type(self).__name__} has nothing to learn.")

    def choices(self, case: Case, backend: str) -> dict[Operation, Choice]:
        """The backend of each operation that :meth:`select` runs besides ``"selection"``, which every plan needs.

        Args:
            case: what is known of the call; its blocks are this selection's.
            backend: what was asked for, one of :data:`~dit_accel.kernels.BACKENDS`.

        Raises:
            ValueError: the backend was named and cannot run one of them.
        """
        return {}

    def uses_lse(self, layout: TokenLayout, key_mask: torch.Tensor | None) -> bool:
        """Whether the log-sum-exp of the call's dense attention would spare :meth:`select` a pass."""
        return False

    def select(
        self,
        blocks: SequenceBlocks,
        tables: Any,
        call: AttentionCall,
        memory: LayerMemory | None = None,
    ) -> BlockMask:
        """Mask of one call.

        Args:
            blocks: the permuted sequence.
            tables: what :meth:`prepare` returned for ``blocks``.
            call: its queries and keys are in the model's order; it names the backend of each operation.
            memory: what the layer keeps from one search to the next; None keeps nothing.
        """
        ...

    def choose_anew(self, blocks: SequenceBlocks, call: AttentionCall, memory: LayerMemory) -> BlockMask:
        """Mask of a call from what an earlier search left in ``memory.base``, without another search.

        Raises:
            TypeError: it cannot.
        """
        raise TypeError(f"{type(self).__name__} cannot choose anew without a search.")

    def scores(self, blocks: SequenceBlocks, tables: Any, call: AttentionCall) -> torch.Tensor:
        """What a calibration averages over calls, float ``[B, H, nq, nk]``: here whether a block is kept."""
        return self.select(blocks, tables, call).to_dense().float()

    def chosen_by(
        self, blocks: SequenceBlocks, scores: torch.Tensor, _hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """bool ``[B, H, nq, nk]``: the blocks to keep by means of :meth:`scores`; here what half the calls kept.

        Blocks of ``hidden``, bool of the same shape, were seen in no call.
        """
        return scores >= 0.5


def check_block(block: tuple[int, int], sizes: tuple[int, ...] = BLOCK_SIZES) -> None:
    """Raise unless ``block`` is a pair of block sizes that the kernels have."""
    if len(block) != 2 or any(size not in sizes for size in block):
        raise ValueError(f"select.block must be two of {sizes} tokens (query, key), got {block}.")


def check_share(name: str, value: float | None) -> None:
    """Raise unless ``value`` is None or a share in (0, 1]."""
    if value is not None and not 0.0 < value <= 1.0:
        raise ValueError(f"select.{name} must lie in (0, 1], got {value}.")


def check_head_densities(densities: HeadDensities) -> None:
    """Raise unless every layer has heads, and every head a share in (0, 1]."""
    for layer in densities:
        if not layer or not all(0.0 < share <= 1.0 for share in layer):
            raise ValueError(f"select.head_densities must hold shares in (0, 1] for every layer, got {layer}.")


def density_of_layer(densities: HeadDensities, layer: int) -> HeadDensities:
    """The entry of one layer.

    Raises:
        ValueError: the model has more layers than there are entries.
    """
    if len(densities) <= 1:
        return densities
    if layer >= len(densities):
        raise ValueError(f"select.head_densities names {len(densities)} layers, the model has a layer {layer}.")
    return (densities[layer],)


def shares_per_head(
    densities: HeadDensities,
    density: float | None,
    heads: int,
    device: torch.device,
    shard: HeadShard | None = None,
) -> float | torch.Tensor | None:
    """``density``, or where one layer's densities are given float32 ``[1, H]``, of the ``shard`` of the layer's heads.

    Raises:
        ValueError: there are as many densities as heads, or one, in no layer.
    """
    if not densities:
        return density
    total = heads if shard is None else shard.total
    if len(densities) > 1 or len(densities[0]) not in (1, total):
        raise ValueError(f"select.head_densities are for {len(densities[0])} heads, the layer has {total}.")
    shares = torch.tensor(densities[0], device=device)
    return (shares if shard is None else shard.own(shares, 0)).expand(1, heads)
