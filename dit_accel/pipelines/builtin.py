"""Models that have a name: trained ones, of distributions of their own, and a random one. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .companion import HOMES, NAMES, absent, adapters, find_folder
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


RANDOM_WAN = Builtin(
    name="random-wan",
    description="a small Wan pipeline with RANDOM weights: it shows speed, not pictures",
    settings=Settings(width=320, height=192, frames=25, steps=8, guidance=4.0),
    build=_random_wan,
)


def builtins() -> dict[str, Builtin]:
    """The built-in models whose weights are at hand, by name, the best first."""
    from . import embedded_image, embedded_long, embedded_model

    trained = {
        "embedded": (embedded_model, embedded_model.load_embedded),
        "embedded-long": (embedded_long, embedded_long.load_embedded_long),
        "embedded-image": (embedded_image, embedded_image.load_embedded_image),
    }
    found = {}
    for name in NAMES:
        if find_folder(name) is not None:
            module, load = trained[name]
            own = adapters() if name == "embedded" else {}
            found[name] = Builtin(name, module.DESCRIPTION, module.SETTINGS, load, own)
    found[RANDOM_WAN.name] = RANDOM_WAN
    return found


def builtin_named(name: str) -> Builtin | None:
    """The built-in model of a name; None for what may be a folder or an id of the hub.

    Raises:
        ValueError: its weights are not installed; the message says what brings them.
    """
    found = builtins().get(name)
    if found is None and name in NAMES and not Path(name).is_dir():
        raise ValueError(absent(f"The model {name!r}", HOMES[name]))
    return found
