"""Tensors in safetensors files, written whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


def save_tensors(draft: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a path of :func:`~dit_accel.files.written_whole`.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    try:
        save_file(dict(tensors), draft, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise OSError(str(error)) from error
