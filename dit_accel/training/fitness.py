"""What can be refused of a fine-tuning before samples are made for it and before its pipeline is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..api import patch
from ..files import refuse_unwritable_folder
from ..patches.learned import is_learned
from ..recipe import Recipe
from .checkpoints import find_checkpoint
from .config import FinetuneConfig
from .data import trained_transformer
from .identity import RunIdentity
from .lent import patch_of
from .noise import noise_process
from .samples import Sample
from .trainables import NOTHING_TO_TRAIN


def refuse_unfit(
    pipe: Any, recipe: Recipe, output: Path, config: FinetuneConfig, *, resume: bool = False, backend: str = "auto"
) -> RunIdentity:
    """Check what can be known of a fine-tuning without its data.

    Args:
        pipe, recipe, output, config, resume, backend: as :func:`~dit_accel.training.finetune.finetune` takes them.

    Returns:
        What the training's checkpoints keep of it.

    Raises:
        ValueError: settings that do not fit the model, a checkpoint of another training, or a folder that cannot be
            written. The pipeline is as it was.
    """
    model = trained_transformer(pipe, config.transformer)
    if config.precision == "no" and model.dtype != torch.float32:
        raise ValueError(f"precision 'no' trains float32 models, the transformer is {model.dtype}; use 'bf16'.")
    if config.density_start is not None and recipe.select.density is None:
        raise ValueError(f"density_start needs a recipe with a density, got {recipe.select!r}.")
    if config.objective.gate and not recipe.select.is_learned:
        raise ValueError(f"objective.gate trains a learned selection, got {type(recipe.select).__name__}.")
    if config.objective.is_few_step:
        process = noise_process(pipe, config.transformer, config.shift)
        if not process.is_flow or process.within != (0.0, 1.0):
            kind = process.prediction if not process.is_flow else "one of two experts"
            raise ValueError(
                f"An objective to few steps needs a model of flow matching for all noise levels, got {kind}; take flow "
                "or distill."
            )
    if patch_of(pipe, recipe) is None:
        with patch(pipe, recipe, backend=backend):
            if config.train == "learned" and not any(is_learned(name) for name, _ in model.named_parameters()):
                raise ValueError(NOTHING_TO_TRAIN.format(train=config.train))
    run = RunIdentity.of(pipe, recipe, config)
    if resume:
        find_checkpoint(output, run)
    refuse_unwritable_folder(output)
    return run


def refuse_other_conditions(sample: Sample, config: FinetuneConfig) -> None:
    """Check that a sample has what an objective to few steps needs.

    Raises:
        ValueError: it has not.
    """
    if not config.objective.is_few_step:
        return
    if config.few_steps.guidance > 1.0 and sample.unconditional is None:
        raise ValueError(
            f"few_steps.guidance {config.few_steps.guidance:g} needs samples with what the model is given without a "
            f"prompt, and {sample.name} has none; make them anew, or take guidance 1."
        )
    if sample.noised is not None and not bool((sample.noised == 1).all()):
        raise ValueError(
            f"An objective to few steps begins at noise alone, and {sample.name} holds some latents clean."
        )


def refuse_other_latents(model: Any, sample: Sample) -> None:
    """Check that a sample's latents are of the model's kind: ``[1, C, ...]``, tokens ``[1, S, C]``, or where a family
    has frames first ``[1, F, C, H, W]``.

    Raises:
        ValueError: they have other channels than the model takes.
    """
    takes = dict(getattr(model, "config", {})).get("in_channels")
    frames_first = type(model).__name__.startswith("CogVideoX") and sample.latents.dim() == 5
    axis = -1 if sample.latents.dim() == 3 else 2 if frames_first else 1
    has = sample.latents.shape[axis] if sample.latents.dim() > 1 else None
    if takes is not None and has != takes:
        raise ValueError(
            f"The sample {sample.name} is of another model: its latents are {list(sample.latents.shape)}, "
            f"{type(model).__name__} takes {takes} channels."
        )
