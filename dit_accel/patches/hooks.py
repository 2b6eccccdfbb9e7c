"""Native torch hooks that publish layer and latents. They leave no trace in state dicts and survive
offloading, LoRA and fused projections, where attention processors are swapped and diffusers' own hooks lose
their order."""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from .ambient import EAGER, TRACED
from .forwards import in_backward
from .hook import Hook
from .in_place import InPlaceOf
from .learned import CHILD
from .operator import count_op
from .reasons import CACHED, NO_CALL, PASSED

if TYPE_CHECKING:
    from .handle import PatchHandle
    from .reuse.tracker import ReuseTracker
    from .session import Session


def _new(kind: type[nn.Module], *arguments: Any) -> nn.Module:
    return kind.__new__(kind, *arguments)


@cache
def patched_class(
    original: type[nn.Module], call_of: Callable[[type[nn.Module]], Callable[..., Any]] | None = None
) -> type[nn.Module]:
    """The class of a patched module: the same in all but identity, and what ``call_of`` makes its ``__call__``.

    torch.compile reuses code between modules of one class and does not look at their hooks. Without a class
    of its own a patched module would silently run code compiled for an unpatched one, or the other way round.
    """

    def reduce_to_original(self: nn.Module, protocol: Any) -> Any:
        make, arguments, *state = cast(tuple[Any, ...], original.__reduce_ex__(self, protocol))
        # A pickler refuses copyreg.__newobj__ for another class than the object's.
        make = _new if make is getattr(copyreg, "__newobj__") else make  # noqa: B009
        return make, tuple(original if a is patched else a for a in arguments), *state

    names = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    call = {} if call_of is None else {"__call__": call_of(original)}
    # A copy or a pickle is of the original class.
    patched = type(original.__name__, (original,), {**names, **call, "__reduce_ex__": reduce_to_original})
    return patched


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """All that a module is given, in lists too: one of images may be the only tensors that differ."""
    values = (*args, *kwargs.values())
    listed = (value if isinstance(value, (list, tuple)) else (value,) for value in values)
    return [value for several in listed for value in several if isinstance(value, torch.Tensor)]


class PublishLayer(Hook):
    """Forward pre-hook of a self-attention module.

    Attributes:
        announced: session and layer.
        layer: their ids for compiled code, in a tensor: torch.compile would specialise a graph for each value of an
            int.
        counts: of calls in compiled code that go past the session, by reason.
    """

    with_kwargs: ClassVar[bool] = False

    def __init__(self, session: Session, layer: int, counts: torch.Tensor) -> None:
        self.announced = (session, layer)
        # On the CPU whatever the default device is: every call reads it.
        self.layer = torch.tensor([session.id, layer], device="cpu")
        self.counts = counts

    def __call__(self, module: nn.Module, _args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            TRACED.layer, TRACED.counts, TRACED.attended = self.layer, self.counts, False
            # Inputs of the graph, so that they get their gradients; eager calls find them by layer.
            learned = module._modules.get(CHILD)
            TRACED.learned = () if learned is None else tuple(learned.parameters())
        else:
            if not in_backward():
                # Else the stack tells: a repetition may end without the hook behind.
                EAGER.layer, EAGER.attended = self.announced, False


class PublishGate(PublishLayer):
    """Forward pre-hook of a self-attention module with a learned gate: what the gate makes of the module's input, which
    the attention call does not see, goes along."""

    with_kwargs: ClassVar[bool] = True

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        super().__call__(module, args)
        learned = module._modules.get(CHILD)
        if learned is None:  # a layer that is always dense
            given: tuple[torch.Tensor, ...] = ()
        else:
            hidden = args[0] if args else (kwargs or {}).get("hidden_states")
            if not isinstance(hidden, torch.Tensor):
                raise ValueError(
                    f"A learned gate reads the hidden_states of {type(module).__name__}, which it was not given."
                )
            given = (learned(hidden),)
        # Also while a forward is repeated for its gradients, whose layer the stack tells.
        ambience = TRACED if torch.compiler.is_compiling() else EAGER
        ambience.learned = given


# Hooks of diffusers by which an attention module may give an earlier output.
_CACHES = ("pyramid_attention_broadcast", "faster_cache_block", "taylorseer_cache")


def _why_no_call(module: nn.Module) -> str:
    registry: Any = getattr(module, "_diffusers_hook", None)
    return CACHED if registry is not None and any(registry.get_hook(name) for name in _CACHES) else NO_CALL


class ClearLayer(Hook):
    """Forward hook of a self-attention module. No exception calls it: torch.compile would make a graph of each hook
    that one calls."""

    def __init__(self, session: Session, layer: int) -> None:
        self.session = session
        self.index = layer

    def __call__(self, module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        if torch.compiler.is_compiling():
            if TRACED.layer is not None and not TRACED.attended:
                assert TRACED.counts is not None
                count_op(TRACED.counts, TRACED.layer, PASSED.index(_why_no_call(module)))
            TRACED.layer = TRACED.counts = None
            TRACED.learned = ()
        else:
            if EAGER.layer is not None and not EAGER.attended:
                self.session.count_dense(self.index, _why_no_call(module))
            EAGER.layer = None
            EAGER.learned = ()


class EnterModule(Hook):
    """Forward pre-hook of a block with a self-attention, and of that: what gradient checkpointing repeats."""

    def __init__(self, session: Session, is_block: bool) -> None:
        self.session = session
        self.is_block = is_block

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tensor = next(iter(_tensors(args, kwargs)), None)
        if not torch.compiler.is_compiling():
            self.session.enter_module(tensor)
        elif self.is_block:
            TRACED.block_input = tensor


class LeaveBlock(Hook):
    """Forward hook of a block with a self-attention."""

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        if torch.compiler.is_compiling():
            # A trace must not end with it: the graph would return it and keep it alive.
            TRACED.block_input = None


WHOLE_COMPILED = (
    "A recipe with reuse decides between the blocks of a forward, which one graph of the whole transformer cannot: "
    "compile its blocks in place of it (transformer.compile_repeated_blocks())."
)


class PublishLatents(Hook):
    """Forward pre-hook of a transformer."""

    def __init__(
        self,
        session: Session,
        handle: PatchHandle,
        argument_names: tuple[str, ...],
        processors: Callable[[], None],
        watch_gradients: Callable[[], None],
    ) -> None:
        self.session = session
        self.handle = handle
        self.argument_names = argument_names
        self.processors = processors
        self.watch_gradients: Callable[[], None] | None = watch_gradients
        self.reuse: ReuseTracker | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        arguments = dict(zip(self.argument_names, args, strict=False))
        arguments.update(kwargs)
        latents = self.session.family.read(self.session.patch_size, arguments)
        if torch.compiler.is_compiling():
            if self.reuse is not None:
                raise ValueError(WHOLE_COMPILED)
            TRACED.latents = latents
        else:
            # A graph that broke may have ended without its last hook.
            TRACED.clear()
            hidden = arguments.get("hidden_states")
            if isinstance(hidden, torch.Tensor):
                # Also where every call will stay dense: a named backend is refused before the first step.
                self.session.engine.refuse_backend(hidden.device, hidden.dtype)
            self.processors()
            if self.watch_gradients is not None and torch.is_grad_enabled():
                self.watch_gradients()
                self.watch_gradients = None
            self.session.begin_forward(latents, arguments.get(self.session.family.timestep), _tensors(args, kwargs))
            if self.reuse is not None:
                self.reuse.begin(module, arguments)


class EndReuse(Hook):
    """Forward hook of a transformer, not called after an exception: what a cache keeps of a forward is whole."""

    def __init__(self, reuse: ReuseTracker) -> None:
        self.reuse = reuse

    def __call__(self, module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
        self.reuse.end(module)


class ClearAll(Hook):
    """Forward hook of a transformer, called also after an exception: nothing published outlives a forward."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        TRACED.clear()
        if not torch.compiler.is_compiling():
            EAGER.layer = None
            EAGER.learned = ()
            # torch calls it while it handles an exception, in which case there is no output.
            self.session.end_forward(sys.exc_info()[1] if output is None else None)


class BranchContext(InPlaceOf):
    """Stands in for a transformer's ``cache_context`` to learn which guidance branch is running."""

    @contextmanager
    def __call__(self, name: str, **kwargs: Any) -> Any:
        outer = EAGER.branch
        EAGER.branch = name
        try:
            with self.original(name, **kwargs):
                yield
        finally:
            EAGER.branch = outer


class RefuseCache(InPlaceOf):
    """Stands in for a transformer's ``enable_cache`` while the recipe reuses across steps itself."""

    def __call__(self, config: Any) -> None:
        raise ValueError(
            f"{type(config).__name__} cannot be enabled beside the recipe's own reuse, since two caches would answer "
            "for each other: patch with reuse none."
        )
