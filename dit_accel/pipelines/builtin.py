"""Models that come with the package, or with dit-accel-models, by name: nothing is downloaded for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .settings import Settings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Builtin:
    """A built-in model.

    Attributes:
        name: as given to :func:`~dit_accel.pipelines.load`.
        description: one line; says so where the weights are random.
        settings: its own defaults, which the pipeline's call has too.
        build: makes the pipeline on the CPU in a dtype (None: the model's own).
        adapters: folders of the adapters that come with it, by name.
    """

    name: str
    description: str
    settings: Settings
    build: Callable[[torch.dtype | None], Any]
    adapters: Mapping[str, Path] = field(default_factory=dict)


def _random_wan(dtype: torch.dtype | None) -> Any:
    from .call_defaults import WanPipeline
    from .random_wan import build_random_wan

    return WanPipeline.of(build_random_wan(dtype), RANDOM_WAN.settings)


def _embedded(dtype: torch.dtype | None) -> Any:
    from .embedded_model import load_embedded

    return load_embedded(dtype)


def _companions() -> dict[str, Builtin]:
    """The models of ``dit-accel-models`` that are installed, by name."""
    from . import companion, embedded_image, embedded_long

    modules = {
        "embedded-long": (embedded_long, embedded_long.load_embedded_long),
        "embedded-image": (embedded_image, embedded_image.load_embedded_image),
    }
    found = {}
    for name in companion.NAMES:
        folder, (module, loaded) = companion.folder_of(name), modules[name]
        if folder is not None:
            found[name] = Builtin(name, module.DESCRIPTION, module.SETTINGS, partial(loaded, folder))
    return found


RANDOM_WAN = Builtin(
    name="random-wan",
    description="a small Wan pipeline with RANDOM weights: it shows speed, not pictures",
    settings=Settings(width=320, height=192, frames=25, steps=8, guidance=4.0),
    build=_random_wan,
)


def builtins() -> dict[str, Builtin]:
    """The built-in models by name, the best first."""
    found = {}
    if find_spec("dit_accel.pipelines.embedded_model") is not None:
        from . import embedded_model

        found["embedded"] = Builtin(
            name="embedded",
            description=embedded_model.DESCRIPTION,
            settings=embedded_model.SETTINGS,
            build=_embedded,
            adapters=embedded_model.adapters(),
        )
        found |= _companions()
    found[RANDOM_WAN.name] = RANDOM_WAN
    return found
