"""What a transformer is called with while a pipeline runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..patches.progress import step_index


class _Enough(Exception):
    """Ends a run whose first forward has been seen."""


def first_forwards(pipe: Any, samples: int, dense_fraction: float) -> Callable[[int], bool]:
    """Says of each forward of a run whether it is the first one of a sampled step."""
    return first_of_steps(pipe, lambda index, steps: index in spread_steps(steps, samples, dense_fraction))


def spread_steps(steps: int, samples: int, dense_fraction: float) -> list[int]:
    """So many of a run's steps, spread over those after its dense phase; fewer where there are fewer."""
    places = [dense_fraction + (n + 0.5) / samples * (1.0 - dense_fraction) for n in range(samples)]
    return sorted({min(int(place * steps), steps - 1) for place in places})


def first_of_steps(pipe: Any, wanted: Callable[[int, int], bool]) -> Callable[[int], bool]:
    """Says of each forward of a run whether it is the first one of a step that is wanted, by its index and how many
    there are. Each step that the forwards are of is asked for once, rising."""
    seen: set[int] = set()

    def keep(_: int) -> bool:
        timesteps = pipe.scheduler.timesteps
        index = step_index(pipe, pipe.scheduler, timesteps)
        if index is None or index in seen:
            return False
        seen.add(index)
        return wanted(index, len(timesteps))

    return keep


def first_input(model: nn.Module, run: Callable[[], Any]) -> dict[str, Any]:
    """Arguments of the first forward of a run, which ends before it is computed.

    Raises:
        ValueError: the run called the transformer with positional arguments, or not at all.
    """
    found: list[dict[str, Any]] = []

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_recorded(module, args, kwargs))
        raise _Enough

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        run()
    except _Enough:
        pass
    finally:
        handle.remove()
    if not found:
        raise ValueError(f"The run never called {type(model).__name__}.")
    return found[0]


def record_inputs(model: nn.Module, run: Callable[[], Any], keep: Callable[[int], bool]) -> list[dict[str, Any]]:
    """Arguments of the forwards of a run for which ``keep(number of the forward)``, tensors on their device."""
    found: list[dict[str, Any]] = []
    count = 0

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        if keep(count):
            found.append(_recorded(module, args, kwargs))
        count += 1

    handle = model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return found


def _recorded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if args:
        raise ValueError(f"{type(module).__name__} was called with positional arguments, which are not recorded.")
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}
