"""A trained FLUX Kontext pipeline: images of a prompt, and edits of an image, with a small model.

Prompt and image are attended to jointly, and a token is two latents by two. It shares autoencoder and grammar with the
video models. ``docs/embedded.md`` says how it was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .companion import autoencoder_for, check_files, folder_of
from .settings import Settings

if TYPE_CHECKING:
    import torch

DESCRIPTION = "a small trained FLUX Kontext pipeline: images of 1024 x 1024, and edits of one, 4,096 tokens each"
SETTINGS = Settings(width=1024, height=1024, frames=None, steps=20, guidance=2.0)
PROMPT_TOKENS = 64


def load_embedded_image(dtype: torch.dtype | None = None, folder: Path | None = None) -> Any:
    """Load the pipeline from ``dit-accel-models``; never touches the network.

    Args:
        dtype: of the transformer and the text encoders; bfloat16, as stored, if None. The autoencoder is float32.
        folder: another copy of the model's folder.

    Returns:
        A ``FluxKontextPipeline`` on the CPU, whose call has :data:`SETTINGS` as its defaults.

    Raises:
        ValueError: that, or the autoencoder of ``embedded``, is not installed.
        FileNotFoundError, ValueError: see :func:`~dit_accel.pipelines.companion.check_files`.
    """
    import diffusers
    import torch
    import transformers

    from .call_defaults import FluxKontextPipeline
    from .dtypes import dtype_argument
    from .image_autoencoder import ImageAutoencoder

    folder = folder_of("embedded-image") if folder is None else folder
    check_files(folder)
    given = dtype_argument(torch.bfloat16 if dtype is None else dtype)
    tokenizer = transformers.PreTrainedTokenizerFast
    # Part by part: reading them all at once, the pipeline would say that two of them are not FLUX's own.
    pipe = diffusers.FluxKontextPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=ImageAutoencoder.of(autoencoder_for("embedded-image")),
        text_encoder=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder", **given),
        tokenizer=tokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=transformers.UMT5EncoderModel.from_pretrained(folder / "text_encoder_2", **given),
        tokenizer_2=tokenizer.from_pretrained(folder / "tokenizer_2"),
        transformer=diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer", **given),
    )
    return FluxKontextPipeline.of(pipe, SETTINGS, max_sequence_length=PROMPT_TOKENS)
