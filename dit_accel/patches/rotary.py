"""Rotary angles that go past a processor to the seam, where one kernel turns queries and keys.

Some processors of diffusers turn pairs of columns by assignments to every second column. torch.compile makes one slow
kernel of that (docs/performance.md), and eager code sixteen. The angles are an argument of the attention module, and
without them the processor leaves queries and keys as they are: so a hook takes them, and the seam turns.

They go in the mask's place, which processors hand on unread. What is published beside a call gets lost where the hook
runs in eager code and the processor in a graph, or the other way round; an argument does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn

from ..kernels.rotary.api import rotate_pairs
from .ambient import TRACED
from .hook import Hook

if TYPE_CHECKING:
    from .session import Session

_MODELS = "diffusers.models.transformers.transformer_"
PROCESSORS = frozenset(
    {
        (f"{_MODELS}wan", "WanAttnProcessor"),
        (f"{_MODELS}wan_animate", "WanAttnProcessor"),
        (f"{_MODELS}skyreels_v2", "SkyReelsV2AttnProcessor"),
        (f"{_MODELS}chronoedit", "WanAttnProcessor"),
    }
)
"""Processors that turn adjacent columns by the argument ``rotary_emb``, (cos, sin), and then only call attention."""
ANGLES = "rotary_emb"
MASK = "attention_mask"
SYMBOL = "dispatch_attention_fn"

_NAME = "dit_accel::rotate_pairs"
torch.library.define(_NAME, "(Tensor q, Tensor k, Tensor cos, Tensor sin) -> (Tensor, Tensor)")


@torch.library.impl(_NAME, "CompositeExplicitAutograd")
def _(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Without a gradient: the hook leaves code that records one alone."""
    return rotate_pairs(q, k, cos, sin)


@torch.library.register_fake(_NAME)
def _(q: torch.Tensor, k: torch.Tensor, _cos: torch.Tensor, _sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


class MaskAndAngles(NamedTuple):
    """What goes in the place of an attention mask: by ``cos`` and ``sin`` queries and keys are still to be turned."""

    mask: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor


class TakeAngles(Hook):
    """Forward pre-hook of a self-attention: takes its angles where the kernel is faster and no gradient is recorded.

    Args:
        session: of the patched transformer.
        kind: class of the processor at patching; another one keeps its angles.
        names: of the arguments that may go by place.
        comes: whether the processor's call comes to the seam: somebody may have replaced the symbol since.
    """

    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    """Types of devices where the kernel is faster."""

    def __init__(self, session: Session, kind: type, names: tuple[str, ...], comes: Callable[[], bool]) -> None:
        self.session = session
        self.kind = kind
        self.names = names
        self.comes = comes

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
        if torch.is_grad_enabled() or type(module.processor) is not self.kind:
            return None
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        angles = given.get(ANGLES)
        if not isinstance(angles, tuple) or angles[0].device.type not in self.devices or not self._comes_to_the_seam():
            return None
        given[MASK], given[ANGLES] = MaskAndAngles(given.get(MASK), *angles), None
        return tuple(given.pop(name) for name in self.names[: len(args)]), given

    def _comes_to_the_seam(self) -> bool:
        if torch.compiler.is_compiling():
            # A checkpointed block is repeated with gradients.
            return TRACED.block_input is None and self.comes()
        return self.session.engine.switched_on and self.comes()


def angles_hook(session: Session, module: nn.Module, is_diverted: Callable[[str, str], bool]) -> TakeAngles | None:
    """The hook of a self-attention module; None where its processor is not of :data:`PROCESSORS`, or a backend was
    named that is not Triton. ``is_diverted`` says of a module and a symbol whether its calls come to the seam."""
    kind: type = type(module.processor)
    if (kind.__module__, kind.__name__) not in PROCESSORS or session.engine.backend not in ("auto", "triton"):
        return None
    names = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if ANGLES not in names or MASK not in names:
        return None
    return TakeAngles(session, kind, names, partial(is_diverted, kind.__module__, SYMBOL))


def turned(
    query: torch.Tensor, key: torch.Tensor, given: MaskAndAngles
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Queries and keys turned by the angles that were taken, and the mask."""
    rotate = torch.ops.dit_accel.rotate_pairs.default if torch.compiler.is_compiling() else rotate_pairs
    query, key = rotate(query, key, given.cos, given.sin)
    return query, key, given.mask
