"""diffusers' pipelines with a model's own size, frames, steps and guidance where a call names none."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import diffusers

from .generate import call_arguments
from .settings import Settings

KEY = "_dit_accel_call"
"""Where the defaults are in a pipeline's config. diffusers keeps a key with an underscore, and looks at none."""

# diffusers' lazy imports hide its classes from a type checker.
_StockWan: Any = diffusers.WanPipeline
_StockKontext: Any = diffusers.FluxKontextPipeline


class _OwnDefaults:
    """A pipeline whose call takes what it is not given from the pipeline's config. It goes before the stock class."""

    @classmethod
    def of(cls, pipe: Any, settings: Settings, **further: Any) -> Any:
        """A pipeline of the components of a stock one, with these settings as its defaults.

        Args:
            pipe: of the stock class.
            settings: of :func:`~dit_accel.pipelines.generate.generate`.
            further: arguments of the call by its own names.
        """
        arguments = inspect.signature(cls.__init__).parameters
        own: Any = cls(**{name: pipe.config[name] for name in arguments if name in pipe.config} | pipe.components)
        own.register_to_config(**{**pipe.config, KEY: call_arguments(pipe, **vars(settings)) | further})
        return own

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """diffusers' ``from_pretrained``, with the defaults that ``save_pretrained`` wrote."""
        stock: Any = super()
        pipe = stock.from_pretrained(pretrained_model_name_or_path, **kwargs)
        config = pipe.load_config(pretrained_model_name_or_path, **kwargs)
        pipe.register_to_config(**{KEY: config.get(KEY, {})})
        return pipe

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        given = inspect.signature(type(self).__call__).bind_partial(self, *args, **kwargs).arguments
        return {name: value for name, value in given.items() if name != "self"}

    def _defaults(self, given: dict[str, Any]) -> dict[str, Any]:
        """The model's own arguments for those that are not given."""
        config: Any = self.config  # type: ignore[attr-defined]
        return {name: value for name, value in config.get(KEY, {}).items() if name not in given}


class WanPipeline(_OwnDefaults, _StockWan):
    """``diffusers.WanPipeline``, whose call takes what it is not given from the pipeline's config.

    diffusers' own defaults are the sizes of the published checkpoints; a small model's rotary table ends before.
    The class has diffusers' name, so that a folder that ``save_pretrained`` writes loads in stock diffusers too,
    without the defaults. :func:`dit_accel.pipelines.load` and this class' ``from_pretrained`` find them again, and
    ``from_pipe`` hands them on.
    """

    @functools.wraps(_StockWan.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs, **self._defaults(self._given(args, kwargs)))


class FluxKontextPipeline(_OwnDefaults, _StockKontext):
    """``diffusers.FluxKontextPipeline`` for a model without distilled guidance, with a model's own call.

    The stock call guides only where it is given ``true_cfg_scale`` and a negative prompt, and makes every image a
    million pixels large. Here ``guidance_scale`` is the scale of classifier-free guidance against an empty prompt, and
    an image has the width and height that are asked for.
    """

    @functools.wraps(_StockKontext.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self._given(args, kwargs)
        added = self._defaults(given)
        asked = added | given
        if not self.transformer.config.guidance_embeds:
            prompt = asked.get("prompt")
            several = isinstance(prompt, (list, tuple))
            negative = {"negative_prompt": [""] * len(prompt) if several else ""} if prompt is not None else {}
            guided = {"true_cfg_scale": asked.get("guidance_scale"), **negative}
            added |= {name: value for name, value in guided.items() if asked.get(name) is None and value is not None}
        if asked.get("width") and asked.get("height"):
            added.setdefault("max_area", asked["width"] * asked["height"])
            if "max_area" in given:
                del added["max_area"]
        return super().__call__(*args, **kwargs, **{k: v for k, v in added.items() if k not in given})
