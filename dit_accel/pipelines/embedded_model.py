"""The trained model that ships with the package: a small Wan text-to-video pipeline.

It is made of stock diffusers classes and knows 28 subjects, 6 colours, 10 places, 9 motions, and counts up
to three; `docs/embedded.md` lists them. The scripts in `examples/train_embedded` trained it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .settings import Settings

if TYPE_CHECKING:
    import torch

FOLDER = Path(__file__).parent / "embedded"
ADAPTERS = FOLDER.with_name("embedded_adapters")
CHECKSUMS = "checksums.json"
DESCRIPTION = "a small trained Wan text-to-video pipeline: animated subjects that move over painted places"
# 29 frames of 192 x 192 pixels are 8 x 24 x 24 = 4608 latent tokens.
SETTINGS = Settings(width=192, height=192, frames=29, steps=10, guidance=2.0)


def adapters() -> dict[str, Path]:
    """Folders of the adapters that were fine-tuned for this model, by name; see docs/finetuning.md."""
    return {card.parent.name: card.parent for card in sorted(ADAPTERS.glob("*/adapter.json"))}


def check_files(folder: Path, distribution: str = "dit-accel") -> None:
    """Compare every file of a model with the digest it was released with.

    Args:
        folder: of the model.
        distribution: what brings it, and is named where a file is not as it should be.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        ValueError: a file is truncated or otherwise not what was released; the message names it.
    """
    index = folder / CHECKSUMS
    if not index.is_file():
        raise FileNotFoundError(f"The embedded model is incomplete: {index} is missing. Install {distribution} again.")
    try:
        digests: dict[str, str] = json.loads(index.read_text())
    except ValueError as error:
        raise ValueError(
            f"The embedded model is damaged: {index} is not JSON. Install {distribution} again."
        ) from error
    for name, expected in digests.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(
                f"The embedded model is incomplete: {file} is missing. Install {distribution} again."
            )
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != expected:
            raise ValueError(
                f"The embedded model is damaged: {file} ({file.stat().st_size} bytes) is not the released "
                f"file. Install {distribution} again."
            )


def load_embedded(dtype: torch.dtype | None = None, folder: Path | None = None) -> Any:
    """Load the embedded pipeline from the installed package; never touches the network.

    Args:
        dtype: of the transformer and the text encoder; bfloat16, as stored, if None.
            The autoencoder is float32.
        folder: another copy of the model's folder.

    Returns:
        A `WanPipeline` on the CPU, whose call has :data:`SETTINGS` as its defaults.

    Raises:
        FileNotFoundError, ValueError: see :func:`check_files`.
    """
    import diffusers
    import torch

    from .call_defaults import WanPipeline
    from .dtypes import dtype_argument

    folder = FOLDER if folder is None else folder
    check_files(folder)
    dtypes = {"default": torch.bfloat16 if dtype is None else dtype, "vae": torch.float32}
    pipe = diffusers.WanPipeline.from_pretrained(folder, local_files_only=True, **dtype_argument(dtypes))
    return WanPipeline.of(pipe, SETTINGS)
