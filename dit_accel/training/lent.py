"""A pipeline lent to a training: patched, with modes and precisions of its own; after an error all is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..api import patch
from ..patches.handle import PatchHandle
from ..patches.targets import handle_of, self_attentions, transformers_of
from ..plain_data import ABSENT, as_plain, first_difference
from ..recipe import Recipe
from .config import FinetuneConfig
from .data import trained_transformer
from .trainables import Trainables

# Attributes of a module that a training or its libraries shadow.
SHADOWED = ("forward", "_original_forward", "gradient_checkpointing", "_gradient_checkpointing_func")


@contextmanager
def lent(pipe: Any, recipe: Recipe, config: FinetuneConfig, backend: str) -> Iterator[tuple[PatchHandle, Trainables]]:
    """The pipeline patched and its transformer ready to train, while the context is open.

    At the end modes, flags and precisions are as they were. After an error so are weights and layers, and the patch is
    removed unless it was there before; weights that FSDP has sharded keep what they learned.

    Raises:
        ValueError: the pipeline is patched with another recipe, or there is nothing to train.
    """
    model = trained_transformer(pipe, config.transformer)
    modes, place = _Modes(model), vars(pipe.scheduler).get("num_inference_steps", ABSENT)
    present = patch_of(pipe, recipe)
    handle = patch(pipe, recipe, backend=backend) if present is None else present
    trainables = None
    try:
        # A pipeline that has generated leaves its last step here; training is at no step of a trajectory.
        pipe.scheduler.num_inference_steps = None
        attentions = {
            path: module
            for name, found, family in transformers_of(pipe)
            if name == config.transformer
            for path, module in self_attentions(found, family)
        }
        trainables = Trainables(model, handle, attentions, config)
        if config.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        yield handle, trainables
        trainables.release()
    except BaseException:
        if trainables is not None:
            trainables.take_back()
        if present is None:
            handle.remove()
        raise
    finally:
        if place is ABSENT:
            vars(pipe.scheduler).pop("num_inference_steps", None)
        else:
            pipe.scheduler.num_inference_steps = place
        if handle.active:
            handle.set_density(None)
        modes.restore()


def patch_of(pipe: Any, recipe: Recipe) -> PatchHandle | None:
    """The handle of a pipeline that is patched with this recipe; None if it is not patched.

    Raises:
        ValueError: it is patched with another recipe.
    """
    try:
        handle = handle_of(pipe)
    except ValueError:
        return None
    difference = first_difference(as_plain(handle.recipe.to_dict()), as_plain(recipe.to_dict()))
    if difference is not None:
        raise ValueError(
            f"{type(pipe).__name__} is patched with {difference}; call unpatch(pipe) before training another recipe."
        )
    return handle


class _Modes:
    """Modes of a model's modules, by module: layers around them come and go."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.training = {module: module.training for module in model.modules()}
        self.shadowed = {
            module: {name: vars(module)[name] for name in SHADOWED if name in vars(module)} for module in self.training
        }

    def restore(self) -> None:
        for module in self.model.modules():
            module.training = self.training.get(module, self.training[self.model])
        for module, before in self.shadowed.items():
            for name in SHADOWED:
                if name in before:
                    setattr(module, name, before[name])
                elif name in vars(module):
                    delattr(module, name)
