"""Models too large for this package's wheel: they come in a distribution of their own, ``dit-accel-models``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from .embedded_model import CHECKSUMS

DISTRIBUTION = "dit-accel-models"
NAMES = ("embedded-long", "embedded-image")


def folder_of(name: str) -> Path | None:
    """Where a model of that distribution is, or None where it is not installed."""
    spec = find_spec(DISTRIBUTION.replace("-", "_"))
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(place) / name.replace("-", "_")
        if (folder / CHECKSUMS).is_file():
            return folder
    return None


def absent(name: str) -> str:
    """The sentence for a model of that distribution that is not installed."""
    return (
        f"The model {name!r} comes in a distribution of its own, {DISTRIBUTION}, which is not installed or does not "
        "hold it: `pip install ./models` in a checkout that has its weights, see models/README.md."
    )
