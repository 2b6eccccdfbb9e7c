"""The built-in trained model: a small Wan text-to-video pipeline.

It is made of stock diffusers classes and knows 28 subjects, 6 colours, 10 places, 9 motions, and counts up
to three; `docs/embedded.md` lists them. The scripts in `examples/train_embedded` trained it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .companion import check_files, folder_of
from .settings import Settings

if TYPE_CHECKING:
    import torch

DESCRIPTION = "a small trained Wan text-to-video pipeline: animated subjects that move over painted places"
# 29 frames of 192 x 192 pixels are 8 x 24 x 24 = 4608 latent tokens.
SETTINGS = Settings(width=192, height=192, frames=29, steps=10, guidance=2.0)


def load_embedded(dtype: torch.dtype | None = None, folder: Path | None = None) -> Any:
    """Load the embedded pipeline from ``dit-accel-models``; never touches the network.

    Args:
        dtype: of the transformer and the text encoder; bfloat16, as stored, if None.
            The autoencoder is float32.
        folder: another copy of the model's folder.

    Returns:
        A `WanPipeline` on the CPU, whose call has :data:`SETTINGS` as its defaults.

    Raises:
        ValueError: that is not installed.
        FileNotFoundError, ValueError: see :func:`~dit_accel.pipelines.companion.check_files`.
    """
    import diffusers
    import torch

    from .call_defaults import WanPipeline
    from .dtypes import dtype_argument

    folder = folder_of("embedded") if folder is None else folder
    check_files(folder)
    dtypes = {"default": torch.bfloat16 if dtype is None else dtype, "vae": torch.float32}
    pipe = diffusers.WanPipeline.from_pretrained(folder, local_files_only=True, **dtype_argument(dtypes))
    return WanPipeline.of(pipe, SETTINGS)
