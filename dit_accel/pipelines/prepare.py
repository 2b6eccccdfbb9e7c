"""What users do to a pipeline before it runs: another task or scheduler, LoRAs, offloading, compiled blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..acceleration.compiled import compile_blocks

OFFLOADS = ("model", "sequential", "group")


def prepared(
    pipe: Any,
    pipeline: str | None,
    scheduler: str | None,
    loras: Sequence[str],
    offloaded: str | None,
    compiled: bool,
    device: torch.device,
) -> Any:
    """A pipeline with all that was asked for, in the order in which these go together.

    Raises:
        ValueError: see the functions below.
    """
    if pipeline is not None:
        pipe = as_pipeline(pipe, pipeline)
    if scheduler is not None:
        set_scheduler(pipe, scheduler)
    if loras:
        load_loras(pipe, loras)
    if compiled:
        compile_blocks(pipe)
    if offloaded is not None:
        offload(pipe, offloaded, device)
    return pipe


def pipeline_class(name: str) -> type[Any]:
    """The class of one of diffusers' pipelines.

    Raises:
        ValueError: there is none of that name.
    """
    import diffusers

    kind = getattr(diffusers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
        raise ValueError(f"diffusers has no pipeline {name!r}.")
    return kind


def as_pipeline(pipe: Any, name: str) -> Any:
    """Another of diffusers' pipelines over the same models.

    Raises:
        ValueError: diffusers has no such pipeline, or it needs a model that this one has not.
    """
    try:
        return pipeline_class(name).from_pipe(pipe)
    except TypeError as error:
        raise ValueError(f"{name} does not go with the models of {type(pipe).__name__}: {error}") from error


def set_scheduler(pipe: Any, kind: str) -> None:
    """Another scheduler, with the settings of the one before.

    Raises:
        ValueError: diffusers has no such scheduler.
    """
    import diffusers

    other = getattr(diffusers, kind, None)
    if not isinstance(other, type) or not issubclass(other, diffusers.SchedulerMixin):
        raise ValueError(f"diffusers has no scheduler {kind!r}.")
    pipe.scheduler = other.from_config(pipe.scheduler.config)


def load_loras(pipe: Any, sources: Sequence[str]) -> None:
    """Load LoRAs, all active together, each with strength 1.

    Args:
        sources: hub ids, folders or files.

    Raises:
        ValueError: the pipeline takes none, or one cannot be loaded.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"{type(pipe).__name__} takes no LoRA.")
    names = [f"lora-{n}" for n in range(len(sources))]
    for name, source in zip(names, sources, strict=True):
        try:
            pipe.load_lora_weights(source, adapter_name=name)
        except (ValueError, OSError, KeyError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"The LoRA {source!r} cannot be loaded: {reason.rstrip('.')}.") from error
    pipe.set_adapters(names)


def refuse_offload(how: str, device: torch.device) -> None:
    """Raise a ValueError where :func:`offload` would, before a model is loaded."""
    if how not in OFFLOADS:
        raise ValueError(f"Offloading must be one of {', '.join(OFFLOADS)}, got {how!r}.")
    if device.type == "cpu":
        raise ValueError("Offloading frees a GPU's memory, and the device is the CPU.")


def offload(pipe: Any, how: str, device: torch.device) -> None:
    """Keep models in the CPU's memory while they do not run.

    Args:
        how: one of :data:`OFFLOADS`: whole models, single layers, or groups of layers.
        device: where they run.

    Raises:
        ValueError: unknown, or the device is the CPU.
    """
    refuse_offload(how, device)
    if how == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif how == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level")
