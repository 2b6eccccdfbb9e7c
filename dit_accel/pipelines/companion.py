"""Where trained weights are: in distributions of their own, so that this one holds code alone.

A checkout has their packages beside ours, in ``models/`` and ``models_long/``, where they are found without being
installed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Distribution:
    """Weights that pip installs together.

    Attributes:
        name: as pip knows it; its package has the same with underscores.
        folder: of its project in a checkout.
        install: what pip is given in a checkout: it, and what it needs.
    """

    name: str
    folder: str
    install: str

    @property
    def package(self) -> str:
        return self.name.replace("-", "_")

    def homes(self) -> list[Path]:
        """Where its files may be: in the installed package, then in a checkout."""
        spec = find_spec(self.package)
        installed = () if spec is None else spec.submodule_search_locations or ()
        return [*map(Path, installed), CHECKOUT / self.folder / self.package]

    def find(self, inside: str) -> Path | None:
        """The folder of a file of the package, or None."""
        return next((file.parent for home in self.homes() if (file := home / inside).is_file()), None)


MODELS = Distribution("dit-accel-models", "models", "./models")
LONG = Distribution("dit-accel-models-long", "models_long", "./models ./models_long")
# The best first: it is what a command takes that is given no model.
HOMES = {"embedded": MODELS, "embedded-long": LONG, "embedded-image": MODELS}
NAMES = tuple(HOMES)
ADAPTERS = ("sla-0.05", "sla-0.1")
CHECKSUMS = "checksums.json"


def find_folder(name: str) -> Path | None:
    """Where the files of one of :data:`NAMES` are, or None where they are not at hand."""
    return HOMES[name].find(f"{name.replace('-', '_')}/{CHECKSUMS}")


def folder_of(name: str) -> Path:
    """Where the files of one of :data:`NAMES` are.

    Raises:
        ValueError: they are not at hand; the message says what brings them.
    """
    folder = find_folder(name)
    if folder is None:
        raise ValueError(absent(f"The model {name!r}", HOMES[name]))
    return folder


def autoencoder_for(name: str) -> Path:
    """The folder of the autoencoder that a model shares with ``embedded``, its files checked.

    Raises:
        ValueError: ``embedded`` is not at hand; the message says what brings it.
        FileNotFoundError, ValueError: see :func:`check_files`.
    """
    folder = find_folder("embedded")
    if folder is None:
        raise ValueError(absent(f"The autoencoder of {name!r}", HOMES["embedded"]))
    check_files(folder)
    return folder / "vae"


def adapters() -> dict[str, Path]:
    """Folders of those of :data:`ADAPTERS` that are at hand, by name. They are of the model ``embedded``; see
    docs/finetuning.md."""
    found = {name: MODELS.find(f"embedded_adapters/{name}/adapter.json") for name in ADAPTERS}
    return {name: folder for name, folder in found.items() if folder is not None}


def absent(what: str, of: Distribution = MODELS) -> str:
    """The sentence for weights that are not at hand, ``what`` as its subject."""
    homes = [home for home in of.homes() if home.is_dir()]
    if homes:
        return f"{what} is of {of.name}, and {homes[0]} does not hold it: {of.folder}/README.md says how it is made."
    return (
        f"{what} comes with {of.name}, which is not installed: `pip install {of.install}` in a checkout of dit-accel."
    )


def check_files(folder: Path, of: Distribution = MODELS) -> None:
    """Compare every file of a model with the digest it was released with.

    Args:
        folder: of the model.
        of: the distribution that brings it, for the message.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ValueError: a file is truncated or otherwise not what was released; the message names it.
    """
    advice = f"Install {of.name} again."
    index = folder / CHECKSUMS
    if not index.is_file():
        raise FileNotFoundError(f"The model is incomplete: {index} is missing. {advice}")
    try:
        digests: dict[str, str] = json.loads(index.read_text())
    except ValueError as error:
        raise ValueError(f"The model is damaged: {index} is not JSON. {advice}") from error
    if not isinstance(digests, dict):
        raise ValueError(f"The model is damaged: {index} has no digests by file. {advice}")
    for name, expected in digests.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"The model is incomplete: {file} is missing. {advice}")
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(
                f"The model is damaged: {file} ({file.stat().st_size} bytes) is not the released file. {advice}"
            )
