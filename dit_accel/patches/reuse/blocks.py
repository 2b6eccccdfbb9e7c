"""The blocks of a transformer that a cache may skip, and a stand-in of it that takes diffusers' hooks."""

from __future__ import annotations

from typing import Any

from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS
from diffusers.hooks.hooks import HookRegistry
from torch import nn

from ...stages.reuse.protocol import Reuse
from .streams import LATENTS, OTHER, known_class, known_names, names_of, streams_of

Blocks = list[tuple[str, nn.Module, type[nn.Module]]]
"""Path, block and the class by which diffusers knows it."""
# Models whose latents change between the blocks, or whose blocks are given more than the one before returned.
_UNFIT = {
    "WanVACETransformer3DModel": "its control blocks add to the latents between the others",
    "MotifVideoTransformer3DModel": "its last blocks are given the latents where others are given the prompt",
    "WanAnimateTransformer3DModel": "what it knows of a face is added to the latents between its blocks",
    "ConsisIDTransformer3DModel": "what it knows of a face is added to the latents between its blocks",
    "HunyuanDiT2DModel": "later blocks are given what earlier ones returned",
    "QwenImage21Transformer2DModel": "they fill a cache of keys, and have other tokens once it is full",
}
# Hooks by which diffusers' caches are known on a module.
_CACHES = ("cache", "fbc_", "pyramid_attention_broadcast", "text_kv")


def blocks_of(model: nn.Module) -> Blocks:
    """The blocks that a cache may skip, in the order of execution.

    Raises:
        ValueError: the model has fewer than two blocks, some of an unknown class, or changes latents between them.
    """
    if type(model).__name__ in _UNFIT:
        raise ValueError(f"reuse cannot skip blocks of {type(model).__name__}: {_UNFIT[type(model).__name__]}.")
    found = [
        (f"{name}.{index}", block)
        for name, child in model.named_children()
        if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(child, nn.ModuleList)
        for index, block in enumerate(child)
    ]
    if len(found) < 2:
        raise ValueError(
            f"reuse needs a transformer with at least two blocks in lists named "
            f"{', '.join(sorted(_ALL_TRANSFORMER_BLOCK_IDENTIFIERS))}, and {type(model).__name__} has {len(found)}."
        )
    known = [
        (path, block, known_class(type(block)))  # type: ignore[arg-type]
        for path, block in found
    ]
    unknown = sorted({type(block).__name__ for _, block, kind in known if kind is None})
    if unknown:
        raise ValueError(
            f"reuse cannot skip blocks of {type(model).__name__}: nobody has said what "
            f"{', '.join(unknown)} takes and returns. Known are {', '.join(known_names())}."
        )
    return [(path, block, kind) for path, block, kind in known if kind is not None]


def refuse_stage(model: nn.Module, blocks: Blocks, stage: Reuse) -> None:
    """Raise where a model's blocks pass their streams on in a way that one cache does not follow.

    Raises:
        ValueError: names the model, and caches that do follow.
    """
    first, last = (streams_of(kind) for _, _, kind in (blocks[0], blocks[-1]))
    name, cache = type(model).__name__, type(stage).__name__
    if stage.needs_usual_names and any(LATENTS not in names_of(one) for one in (first, last)):
        raise ValueError(
            f"{cache} finds no latents in the blocks of {name}, which do not call them {LATENTS}; reuse listed, "
            "magnitude and forecast do."
        )
    if stage.needs_usual_prompt and any(len(names_of(one)) > 1 and OTHER not in names_of(one) for one in (first, last)):
        raise ValueError(
            f"{cache} cannot skip blocks of {name}, which do not call the prompt {OTHER}; reuse listed and forecast do."
        )
    joined = first.return_encoder_hidden_states_index is not None and last.return_encoder_hidden_states_index is None
    # As some last blocks of joint attention do, whose prompt nobody reads any more.
    dropped = getattr(blocks[-1][1], "context_pre_only", False)
    if (joined and stage.needs_all_streams) or (dropped and not stage.takes_dropped_stream):
        raise ValueError(
            f"The last block of {name} returns no stream of the prompt, which {cache} needs; reuse listed and "
            "magnitude do without."
        )


def stand_in_of(blocks: Blocks) -> nn.Module:
    """A module with blocks of the same classes at the same paths, which hold nothing."""
    root = nn.Module()
    for path, _, kind in blocks:
        name = path.partition(".")[0]
        if not hasattr(root, name):
            root.add_module(name, nn.ModuleList())
        block = kind.__new__(kind)
        nn.Module.__init__(block)
        root.get_submodule(name).append(block)  # type: ignore[operator]
    return root


def hooks_of(module: nn.Module) -> list[Any]:
    """The hooks that diffusers put on a module itself."""
    registry: HookRegistry | None = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else list(registry.hooks.values())


def cache_of_the_user(model: nn.Module) -> str | None:
    """The name of a cache that somebody enabled on a transformer; None without one."""
    config = getattr(model, "_cache_config", None)
    if config is not None:
        return type(config).__name__
    for module in model.modules():
        registry: HookRegistry | None = getattr(module, "_diffusers_hook", None)
        for name in registry.hooks if registry is not None else ():
            if any(part in name for part in _CACHES):
                return name
    # cache-dit and ParaAttention replace forwards, and leave this mark.
    return "of cache-dit or ParaAttention" if getattr(model, "_is_cached", False) else None
