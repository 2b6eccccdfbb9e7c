"""Rotary angles that go past a processor to the seam, where one kernel turns queries and keys.

Some processors of diffusers turn pairs of columns by assignments to every second column. torch.compile makes one slow
kernel of that (docs/performance.md), and eager code a dozen. The angles are an argument of the attention module, and
without them the processor leaves queries and keys as they are: so a hook takes them, and the seam turns.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..kernels.rotary.api import rotate_pairs
from .ambient import EAGER, TRACED
from .hooks import Hook

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
ARGUMENT = "rotary_emb"
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


class TakeAngles(Hook):
    """Forward pre-hook of a self-attention: takes its angles where the kernel is faster and no gradient is recorded.

    Args:
        session: of the patched transformer.
        kind: class of the processor at patching; another one keeps its angles.
        place: of the angles among the arguments that go by place.
        comes: whether the processor's call comes to the seam: somebody may have replaced the symbol since.
    """

    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    """Types of devices where the kernel is faster."""

    def __init__(self, session: Session, kind: type, place: int, comes: Callable[[], bool]) -> None:
        self.session = session
        self.kind = kind
        self.place = place
        self.comes = comes

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
        by_place = len(args) > self.place
        angles = args[self.place] if by_place else kwargs.get(ARGUMENT)
        if not isinstance(angles, tuple) or not self._takes(module, angles):
            return None
        (TRACED if torch.compiler.is_compiling() else EAGER).angles = angles
        if by_place:
            return (*args[: self.place], None, *args[self.place + 1 :]), kwargs
        return args, {**kwargs, ARGUMENT: None}

    def _takes(self, module: nn.Module, angles: tuple[torch.Tensor, ...]) -> bool:
        if torch.is_grad_enabled() or type(module.processor) is not self.kind:
            return False
        if angles[0].device.type not in self.devices:
            return False
        if torch.compiler.is_compiling():
            return TRACED.block_input is None  # a checkpointed block is repeated with gradients
        return self.session.engine.switched_on and self.comes()


def angles_hook(session: Session, module: nn.Module, is_diverted: Callable[[str, str], bool]) -> TakeAngles | None:
    """The hook of a self-attention module; None where its processor is not of :data:`PROCESSORS`, or a backend was
    named that is not Triton. ``is_diverted`` says of a module and a symbol whether its calls come to the seam."""
    kind: type = type(module.processor)
    if (kind.__module__, kind.__name__) not in PROCESSORS or session.engine.backend not in ("auto", "triton"):
        return None
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    if ARGUMENT not in names:
        return None
    return TakeAngles(session, kind, names.index(ARGUMENT), partial(is_diverted, kind.__module__, SYMBOL))


def turned(query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of the announced layer, turned by the angles that were taken of it, if any."""
    compiling = torch.compiler.is_compiling()
    here = TRACED if compiling else EAGER
    if not here.angles:
        return query, key
    cos, sin = here.angles
    here.angles = ()
    if compiling:
        return torch.ops.dit_accel.rotate_pairs.default(query, key, cos, sin)
    return rotate_pairs(query, key, cos, sin)
