"""A trained Wan text-to-video pipeline at the length of real clips: 81 frames of 832 x 480, 32,760 tokens.

It shares autoencoder and grammar with the small model, whose distribution it needs. ``docs/embedded.md`` says how it
was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .companion import LONG, autoencoder_for, check_files, folder_of
from .settings import Settings

if TYPE_CHECKING:
    import torch

DESCRIPTION = "a small trained Wan text-to-video pipeline at real length: 81 frames of 832 x 480, 32,760 tokens"
SETTINGS = Settings(width=832, height=480, frames=81, steps=20, guidance=2.0)


def load_embedded_long(dtype: torch.dtype | None = None, folder: Path | None = None) -> Any:
    """Load the pipeline from ``dit-accel-models-long``; never touches the network.

    Args:
        dtype: of the transformer and the text encoder; bfloat16, as stored, if None. The autoencoder is float32.
        folder: another copy of the model's folder.

    Returns:
        A ``WanPipeline`` on the CPU, whose call has :data:`SETTINGS` as its defaults.

    Raises:
        ValueError: that, or ``dit-accel-models`` with the autoencoder, is not installed.
        FileNotFoundError, ValueError: see :func:`~dit_accel.pipelines.companion.check_files`.
    """
    import diffusers
    import torch

    from .call_defaults import WanPipeline
    from .dtypes import dtype_argument

    folder = folder_of("embedded-long") if folder is None else folder
    check_files(folder, LONG)
    shared = autoencoder_for("embedded-long")
    vae = diffusers.AutoencoderKLWan.from_pretrained(shared, **dtype_argument(torch.float32))
    pipe = diffusers.WanPipeline.from_pretrained(
        folder, vae=vae, local_files_only=True, **dtype_argument(torch.bfloat16 if dtype is None else dtype)
    )
    return WanPipeline.of(pipe, SETTINGS)
