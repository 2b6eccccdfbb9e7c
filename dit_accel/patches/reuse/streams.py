"""What a block takes and returns: as diffusers' caches have it, and for classes that they do not know."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import nn

LATENTS = "hidden_states"
OTHER = "encoder_hidden_states"
Returned = tuple[int, "int | None"]
"""Places of the latents and of the prompt in what a block returns; None where it returns the latents alone."""

_LATENTS_ALONE: Returned = (0, None)
_LATENTS_FIRST: Returned = (0, 1)
_PROMPT_FIRST: Returned = (1, 0)
# Of diffusers 0.42.1, by class name. tests/patches/test_reuse_families.py runs each.
_RETURNED: Mapping[str, Returned] = {
    "AllegroTransformerBlock": _LATENTS_ALONE,
    "AnyFlowTransformerBlock": _LATENTS_ALONE,
    "AuraFlowSingleTransformerBlock": _LATENTS_ALONE,
    "BriaFibo2TransformerBlock": _LATENTS_ALONE,
    "BriaFiboSingleTransformerBlock": _LATENTS_ALONE,
    "BriaFiboTransformerBlock": _PROMPT_FIRST,
    "BriaSingleTransformerBlock": _PROMPT_FIRST,
    "BriaTransformerBlock": _PROMPT_FIRST,
    "ChromaSingleTransformerBlock": _LATENTS_ALONE,
    "ChromaTransformerBlock": _PROMPT_FIRST,
    "CogView3PlusTransformerBlock": _LATENTS_FIRST,
    "ConsisIDBlock": _LATENTS_FIRST,
    "CosmosTransformerBlock": _LATENTS_ALONE,
    "EasyAnimateTransformerBlock": _LATENTS_FIRST,
    "ErnieImageSharedAdaLNBlock": _LATENTS_ALONE,
    "GlmImageTransformerBlock": _LATENTS_FIRST,
    "HeliosTransformerBlock": _LATENTS_ALONE,
    "HunyuanVideo15TransformerBlock": _LATENTS_FIRST,
    "Ideogram4TransformerBlock": _LATENTS_ALONE,
    "Krea2TransformerBlock": _LATENTS_ALONE,
    "LongCatImageSingleTransformerBlock": _PROMPT_FIRST,
    "LongCatImageTransformerBlock": _PROMPT_FIRST,
    "Lumina2TransformerBlock": _LATENTS_ALONE,
    "MiniMaxH3TransformerBlock": _LATENTS_ALONE,
    "NucleusMoEImageTransformerBlock": _LATENTS_ALONE,
    "OmniGenBlock": _LATENTS_ALONE,
    "OvisImageSingleTransformerBlock": _PROMPT_FIRST,
    "OvisImageTransformerBlock": _PROMPT_FIRST,
    "PRXBlock": _LATENTS_ALONE,
    "SkyReelsV2TransformerBlock": _LATENTS_ALONE,
    "WanTransformerBlock": _LATENTS_ALONE,
    "ZImageTransformerBlock": _LATENTS_ALONE,
}

# Which diffusers knows, and of which it says that they return the latents alone.
_WRONG = frozenset(("BriaTransformerBlock",))


def streams_of(kind: type[nn.Module]) -> TransformerBlockMetadata:
    """What diffusers' hooks ask of a class that :func:`known_class` gave."""
    return TransformerBlockRegistry.get(kind)


def names_of(streams: Any) -> set[str]:
    """The arguments by which a block is given its streams."""
    latents = getattr(streams, "hidden_states_argument_name", LATENTS)
    if streams.return_encoder_hidden_states_index is None:
        return {latents}
    return {latents, getattr(streams, "encoder_hidden_states_argument_name", OTHER)}


@cache
def known_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class under which diffusers' hooks find a block's streams; None where nobody knows them.

    It is the block's own, or one that the block's was made of (sharding, a patch). Where diffusers does not know it, or
    is wrong about it, it is a class of ours beside it: what diffusers says of its own stays as it is.
    """
    for base in kind.__mro__:
        takes = _takes(base)
        if base.__name__ not in _WRONG and _of_diffusers(base, takes) is not None:
            return base
        returned = _RETURNED.get(base.__name__)
        if returned is not None and takes:
            # The latents come first in every block.
            streams = TransformerBlockMetadata(*returned, takes[0], OTHER)  # type: ignore[arg-type]
            own = type(base.__name__, (base,), {"__module__": base.__module__})
            TransformerBlockRegistry.register(own, streams)
            return own
    return None


def known_names() -> list[str]:
    """Names of all classes whose streams are known."""
    of_diffusers = {kind.__name__ for kind in TransformerBlockRegistry._registry}
    return sorted(of_diffusers | set(_RETURNED))


def _takes(kind: type) -> list[str]:
    """Names of the arguments of a class' own forward; none where it has none."""
    forward = vars(kind).get("forward")
    return [] if forward is None else list(inspect.signature(forward).parameters)[1:]


def _of_diffusers(kind: type[nn.Module], takes: list[str]) -> TransformerBlockMetadata | None:
    try:
        streams = TransformerBlockRegistry.get(kind)
    except ValueError:
        return None
    return streams if names_of(streams) <= set(takes) else None
