"""A trained Wan text-to-video pipeline at the length of real clips: 81 frames of 832 x 480, 32,760 tokens.

It shares autoencoder and grammar with the model in the package. ``docs/embedded.md`` says how it was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .companion import DISTRIBUTION
from .embedded_model import FOLDER, check_files
from .settings import Settings

if TYPE_CHECKING:
    import torch

DESCRIPTION = "a small trained Wan text-to-video pipeline at real length: 81 frames of 832 x 480, 32,760 tokens"
SETTINGS = Settings(width=832, height=480, frames=81, steps=20, guidance=2.0)


def load_embedded_long(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """Load the pipeline from a folder of ``dit-accel-models``; never touches the network.

    Args:
        folder: of the model.
        dtype: of the transformer and the text encoder; bfloat16, as stored, if None. The autoencoder is float32.

    Returns:
        A ``WanPipeline`` on the CPU, whose call has :data:`SETTINGS` as its defaults.

    Raises:
        FileNotFoundError, ValueError: see :func:`~dit_accel.pipelines.embedded_model.check_files`.
    """
    import diffusers
    import torch

    from .call_defaults import WanPipeline
    from .dtypes import dtype_argument

    check_files(folder, DISTRIBUTION)
    vae = diffusers.AutoencoderKLWan.from_pretrained(FOLDER / "vae", **dtype_argument(torch.float32))
    pipe = diffusers.WanPipeline.from_pretrained(
        folder, vae=vae, local_files_only=True, **dtype_argument(torch.bfloat16 if dtype is None else dtype)
    )
    return WanPipeline.of(pipe, SETTINGS)
