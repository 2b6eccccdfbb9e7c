"""Where trained weights are: in a distribution of their own, ``dit-accel-models``, so that this one holds code alone.

A checkout has that distribution's package beside ours, in ``models/``, where it is found without being installed.
"""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path

DISTRIBUTION = "dit-accel-models"
PACKAGE = DISTRIBUTION.replace("-", "_")
CHECKOUT = Path(__file__).parents[2] / "models" / PACKAGE
# The best first: it is what a command takes that is given no model.
NAMES = ("embedded", "embedded-long", "embedded-image")
ADAPTERS = ("sla-0.05", "sla-0.1")
CHECKSUMS = "checksums.json"


def find_folder(name: str) -> Path | None:
    """Where the files of one of :data:`NAMES` are, or None where they are not at hand."""
    return _find(f"{name.replace('-', '_')}/{CHECKSUMS}")


def folder_of(name: str) -> Path:
    """Where the files of one of :data:`NAMES` are.

    Raises:
        ValueError: they are not at hand; the message says what brings them.
    """
    folder = find_folder(name)
    if folder is None:
        raise ValueError(absent(f"The model {name!r}"))
    return folder


def adapters() -> dict[str, Path]:
    """Folders of those of :data:`ADAPTERS` that are at hand, by name. They are of the model ``embedded``; see
    docs/finetuning.md."""
    found = {name: _find(f"embedded_adapters/{name}/adapter.json") for name in ADAPTERS}
    return {name: folder for name, folder in found.items() if folder is not None}


def absent(what: str) -> str:
    """The sentence for weights that are not at hand, ``what`` as its subject."""
    homes = [home for home in _homes() if home.is_dir()]
    if homes:
        return f"{what} is of {DISTRIBUTION}, and {homes[0]} does not hold it: models/README.md says how it is made."
    return (
        f"{what} comes with {DISTRIBUTION}, which is not installed: `pip install ./models` in a checkout of dit-accel."
    )


def check_files(folder: Path) -> None:
    """Compare every file of a model with the digest it was released with.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ValueError: a file is truncated or otherwise not what was released; the message names it.
    """
    advice = f"Install {DISTRIBUTION} again."
    index = folder / CHECKSUMS
    if not index.is_file():
        raise FileNotFoundError(f"The model is incomplete: {index} is missing. {advice}")
    try:
        digests: dict[str, str] = json.loads(index.read_text())
    except ValueError as error:
        raise ValueError(f"The model is damaged: {index} is not JSON. {advice}") from error
    for name, expected in digests.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"The model is incomplete: {file} is missing. {advice}")
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(
                f"The model is damaged: {file} ({file.stat().st_size} bytes) is not the released file. {advice}"
            )


def _homes() -> list[Path]:
    """Where weights may be: in the installed package, then in a checkout."""
    spec = find_spec(PACKAGE)
    installed = () if spec is None else spec.submodule_search_locations or ()
    return [*map(Path, installed), CHECKOUT]


def _find(inside: str) -> Path | None:
    """The folder of a file of the package, or None."""
    return next((file.parent for home in _homes() if (file := home / inside).is_file()), None)
