"""The nodes: patch a model, say what ran, take the patch back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_accel import Recipe, presets
from dit_accel.kernels import BACKENDS
from dit_accel.runner import why_not_run

from .acceleration import FORWARD, OVERRIDE, RUN, Acceleration
from .models import model_of

KEY = "dit_accel"
CATEGORY = "model_patches/dit_accel"
DEFAULT = "default"


def runnable_presets() -> list[str]:
    """The presets that need attention's calls and nothing else."""
    return [name for name, preset in presets.PRESETS.items() if name != "dense" and why_not_run(preset()) is None]


def recipe_of(recipe: str, density: float, dense_fraction: float, recipe_file: str) -> Recipe | None:
    """A recipe as the widgets say it; None for the default.

    Raises:
        ValueError: a file without a recipe, or a value that the recipe cannot have.
    """
    if recipe_file.strip():
        found = Recipe.load(Path(recipe_file.strip()))
    elif recipe == DEFAULT:
        if density == 0.0 and dense_fraction < 0.0:
            return None
        found = presets.automatic()
    else:
        found = presets.resolve(recipe)
    changes: dict[str, Any] = {}
    if density > 0.0:
        if found.select.density is None:
            raise ValueError(f"The recipe {recipe_file.strip() or recipe!r} has no density; leave density at 0.")
        changes["select.density"] = density
    if dense_fraction >= 0.0:
        changes["schedule.dense_fraction"] = dense_fraction
    return found.with_fields(changes) if changes else found


class PatchModel:
    """Sparse self-attention for a video or image model."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Makes a model's self-attention sparse. The model that comes in stays as it is."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        names = [DEFAULT, *runnable_presets()]
        return {
            "required": {
                "model": ("MODEL",),
                "recipe": (names, {"default": DEFAULT, "tooltip": "How blocks of tokens are chosen."}),
                "density": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.01}
                    | {"tooltip": "Share of the blocks that attention keeps; 0 for the recipe's own."},
                ),
                "dense_fraction": (
                    "FLOAT",
                    {"default": -1.0, "min": -1.0, "max": 1.0, "step": 0.01}
                    | {"tooltip": "Share of the steps, from the first, that stay dense; -1 for the recipe's own."},
                ),
            },
            "optional": {
                "recipe_file": (
                    "STRING",
                    {"default": "", "tooltip": "A file of dit-accel tune or search, in place of the recipe."},
                ),
                "backend": (list(BACKENDS), {"default": "auto"}),
            },
        }

    def patch(
        self,
        model: Any,
        recipe: str,
        density: float,
        dense_fraction: float,
        recipe_file: str = "",
        backend: str = "auto",
    ) -> tuple[Any]:
        """A clone of the model with the patch.

        Raises:
            ValueError: a model of no known class, one that is patched already, or a recipe that cannot be.
        """
        if model.get_attachment(KEY) is not None:
            raise ValueError("This model has a patch of dit_accel already; take the one before it.")
        module = model.get_model_object("diffusion_model")
        options = model.model_options["transformer_options"]
        acceleration = Acceleration(
            model_of(module),
            module,
            recipe_of(recipe, density, dense_fraction, recipe_file),
            backend,
            options.get(OVERRIDE),
        )
        patched = model.clone()
        patched.model_options["transformer_options"][OVERRIDE] = acceleration.override
        patched.add_wrapper_with_key(RUN, KEY, acceleration.run)
        patched.add_wrapper_with_key(FORWARD, KEY, acceleration.wrapper)
        patched.set_attachments(KEY, acceleration)
        return (patched,)


class Summary:
    """What the latest sampling of a patched model did."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "What really ran: density, time, and why calls were dense. "
        "Connect the sampler's output, so that this comes after it."
    )
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("summary",)
    FUNCTION = "summarise"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "latent": ("LATENT",)}}

    def summarise(self, model: Any, latent: Any) -> dict[str, Any]:
        """The summary as text, for other nodes and for this one's display.

        Raises:
            ValueError: the model has no patch.
        """
        text = str(_patch_of(model).summary())
        return {"ui": {"text": (text,)}, "result": (text,)}


class UnpatchModel:
    """The model without the patch."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Takes the patch back, and leaves what other nodes did."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "unpatch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def unpatch(self, model: Any) -> tuple[Any]:
        """A clone of the model without the patch.

        Raises:
            ValueError: the model has none, or another node has put its attention on top of it.
        """
        acceleration = _patch_of(model)
        clone = model.clone()
        options = clone.model_options["transformer_options"]
        if options.get(OVERRIDE) is not acceleration.override:
            raise ValueError("Another node has changed attention after the patch; take the model before the patch.")
        if acceleration.before is None:
            del options[OVERRIDE]
        else:
            options[OVERRIDE] = acceleration.before
        clone.remove_wrappers_with_key(RUN, KEY)
        clone.remove_wrappers_with_key(FORWARD, KEY)
        clone.remove_attachments(KEY)
        return (clone,)


def _patch_of(model: Any) -> Acceleration:
    acceleration = model.get_attachment(KEY)
    if acceleration is None:
        raise ValueError("This model has no patch of dit_accel.")
    return acceleration


NODE_CLASS_MAPPINGS = {
    "DitAccelPatchModel": PatchModel,
    "DitAccelSummary": Summary,
    "DitAccelUnpatchModel": UnpatchModel,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DitAccelPatchModel": "Sparse attention (dit_accel)",
    "DitAccelSummary": "Sparse attention: summary",
    "DitAccelUnpatchModel": "Sparse attention: unpatch",
}
