"""The runs that a calibration or a search makes of a pipeline: their arguments, checked before the first."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..patches.targets import handle_of
from ..recipe import Recipe
from .identity import describe, describe_pipeline

# Plans and recorded forwards are of one latent grid.
SIZES = ("height", "width", "num_frames")


def run_arguments(
    pipe: Any, prompts: Sequence[Any], generate_kwargs: Mapping[str, Any] | None, seeds: Sequence[int] | None
) -> list[dict[str, Any]]:
    """Arguments of the pipeline's call for each prompt.

    Args:
        prompts: texts, or arguments of the call in place of one.
        generate_kwargs: further arguments, which a prompt's own replace.
        seeds: as the user gave them; None for none.

    Raises:
        ValueError: no prompts, a number of seeds that is another, seeds beside a generator, an argument that the
            pipeline does not take, several sizes, or a pipeline that is patched or runs in parallel already.
    """
    if isinstance(prompts, (str, Mapping)) or not prompts:
        raise ValueError(f"prompts must be a non-empty sequence, got {prompts!r}.")
    if seeds is not None and len(seeds) != len(prompts):
        raise ValueError(f"seeds must be as many as prompts, {len(prompts)}, got {len(seeds)}.")
    runs = []
    for prompt in prompts:
        if not isinstance(prompt, (str, Mapping)):
            raise ValueError(f"a prompt must be text or a mapping of arguments, got {type(prompt).__name__}.")
        own = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
        runs.append({**(generate_kwargs or {}), **own})
    takes = inspect.signature(type(pipe).__call__).parameters
    for arguments in runs:
        unknown = [name for name in arguments if name not in takes]
        if unknown and not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes.values()):
            raise ValueError(f"{type(pipe).__name__} takes no {unknown[0]}, got {arguments[unknown[0]]!r}.")
        if seeds is not None and arguments.get("generator") is not None:
            raise ValueError("seeds and a generator exclude each other, got both.")
    for name in SIZES:
        values = {arguments.get(name) for arguments in runs}
        if len(values) > 1:
            raise ValueError(f"The prompts must share one {name}, got {', '.join(map(str, values))}.")
    for name, component in getattr(pipe, "components", {}).items():
        if getattr(component, "_parallel_config", None) is not None:
            raise ValueError(
                f"{name} shares its heads among processes, and each would measure its own alone: calibrate and search "
                "in one process, before enable_parallelism. What they find holds for any number of processes."
            )
    try:
        handle_of(pipe)
    except ValueError:
        return runs
    raise ValueError(f"{type(pipe).__name__} is patched; call unpatch(pipe) or handle.remove() first.")


def asked_of(
    pipe: Any,
    prompts: Sequence[Any],
    recipe: Recipe,
    samples: int,
    seed: int,
    generate_kwargs: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All that a search's measurements depend on, whatever its target."""
    from .. import __version__

    return {
        "dit_accel": __version__,
        "recipe": recipe.to_dict(),
        "prompts": describe(prompts),
        "seed": seed,
        "samples": samples,
        "arguments": describe(generate_kwargs or {}),
        "pipeline": describe_pipeline(pipe),
    }


def begin(arguments: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Arguments of one run, with a generator of its own: a run that is repeated begins with the same noise."""
    given = arguments.get("generator")
    if given is None:
        generator: Any = torch.Generator().manual_seed(seed)
    elif isinstance(given, (list, tuple)):
        generator = [_copy(one) for one in given]
    else:
        generator = _copy(given)
    return {"output_type": "latent", **arguments, "generator": generator}


def _copy(generator: torch.Generator) -> torch.Generator:
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    return copy
