"""diffusers' Wan pipeline with a model's own size, frames, steps and guidance where a call names none."""

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
_Stock: Any = diffusers.WanPipeline


class WanPipeline(_Stock):
    """``diffusers.WanPipeline``, whose call takes what it is not given from the pipeline's config.

    diffusers' own defaults are the sizes of the published checkpoints; a small model's rotary table ends before.
    The class has diffusers' name, so that a folder that ``save_pretrained`` writes loads in stock diffusers too,
    without the defaults. :func:`dit_accel.pipelines.load` and this class' ``from_pretrained`` find them again, and
    ``from_pipe`` hands them on.
    """

    @classmethod
    def of(cls, pipe: Any, settings: Settings) -> WanPipeline:
        """A pipeline of the components of a ``diffusers.WanPipeline``, with these settings as its defaults."""
        arguments = inspect.signature(_Stock.__init__).parameters
        own = cls(**{name: pipe.config[name] for name in arguments if name in pipe.config} | pipe.components)
        own.register_to_config(**{**pipe.config, KEY: call_arguments(pipe, **vars(settings))})
        return own

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> WanPipeline:
        """diffusers' ``from_pretrained``, with the defaults that ``save_pretrained`` wrote."""
        pipe: WanPipeline = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        config = cls.load_config(pretrained_model_name_or_path, **kwargs)
        pipe.register_to_config(**{KEY: config.get(KEY, {})})
        return pipe

    @functools.wraps(_Stock.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(_Stock.__call__).bind_partial(self, *args, **kwargs).arguments
        defaults = {name: value for name, value in self.config.get(KEY, {}).items() if name not in given}
        return super().__call__(*args, **kwargs, **defaults)
