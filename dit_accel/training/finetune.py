"""Fine-tuning of a pipeline under a recipe: what is refused, what is lent and given back, and the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import presets
from ..patches.handle import PatchHandle
from ..recipe import Recipe
from .adapter import take_steps
from .batches import Samples
from .config import FinetuneConfig
from .curves import Curves
from .data import trained_transformer
from .fitness import refuse_other_conditions, refuse_other_latents, refuse_unfit
from .identity import survey
from .lent import lent
from .loop import Loop, TrainingStopped

__all__ = ["FinetuneResult", "TrainingStopped", "finetune"]


@dataclass(frozen=True, eq=False)
class FinetuneResult:
    """A finished fine-tuning: the pipeline is patched and holds the trained weights.

    Attributes:
        handle: of the patch.
        curves: losses and evaluations.
        adapter: folder of the saved adapter.
    """

    handle: PatchHandle
    curves: Curves
    adapter: Path


def finetune(
    pipe: Any,
    recipe: Recipe | str,
    data: Samples,
    output: str | Path,
    config: FinetuneConfig | None = None,
    *,
    resume: bool = False,
    backend: str = "auto",
    on_step: Callable[[dict[str, float]], None] | None = None,
    measure: Callable[[int], Mapping[str, float]] | None = None,
    **options: Any,
) -> FinetuneResult:
    """Fine-tune a pipeline's transformer under a recipe, and save an adapter.

    Started once for each device (``accelerate launch``, ``torchrun``) it trains on all of them. Data order
    and noise depend on the seed and the position of a sample alone, so that neither the number of processes
    nor a resumption changes them. Processes that share a sequence (``enable_parallelism`` before this) have the same
    samples.

    After an error, and after Ctrl-C, the pipeline is as it was: weights, layers, modes, and no patch unless it had one.

    Args:
        pipe: a pipeline of flow matching, or of a model that predicts noise, velocity or data, which stays patched; one
            that is patched already must have this recipe.
        recipe: see :func:`~dit_accel.patch`; ``options`` are those of a preset.
        data: training samples.
        output: folder for curves (JSON, PNG, TensorBoard), checkpoints and the adapter. What an earlier training
            left there is moved to a folder ``earlier-1``, ``earlier-2`` ... in it.
        config: settings.
        resume: go on from the newest checkpoint in ``output``, if there is one. Recipe, settings that matter to what
            is learned, weights before the training and samples must be those it began with.
        on_step: called with each step's numbers, on the first process.
        measure: called at each evaluation with the steps done, the patch on and averaged weights in place;
            its numbers join the curves. It may generate with ``pipe``.

    Raises:
        ValueError: no samples, samples or settings that do not fit the model, a checkpoint of another training, a
            folder or disk that cannot be written, or FSDP 1.
        TrainingStopped: a loss or gradient is not finite.
    """
    config, output = config or FinetuneConfig(), Path(output)
    chosen = presets.resolve(recipe, **options)
    found = survey(data, config.batch_size)
    refuse_other_latents(trained_transformer(pipe, config.transformer), data[0])
    refuse_other_conditions(data[0], config)
    run = refuse_unfit(pipe, chosen, output, config, resume=resume, backend=backend)
    with lent(pipe, chosen, config, backend) as (handle, trainables):
        loop = Loop(pipe, handle, trainables, data, output, config, run, found)
        adapter = loop.run(resume, on_step, measure)
    take_steps(pipe, handle, loop.few_steps, "the model")
    return FinetuneResult(handle, loop.curves, adapter)
