"""Files of tensors, written whole, with one sentence where they cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .files import written_whole


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what libraries raise when ``path`` cannot be written into one sentence.

    Raises:
        ValueError: the file or folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"Cannot write {path}: {error.strerror or error}.") from error
    except RuntimeError as error:
        # torch.save says of a full disk only where in its own archive it is.
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise ValueError(f"Cannot write {path}: torch.save failed, the disk may be full.") from error


def save_tensors(draft: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors to a path of :func:`~dit_accel.files.written_whole`.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    try:
        save_file(dict(tensors), draft, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise OSError(str(error).removeprefix("Error while serializing: ")) from error


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, whole or not at all.

    Raises:
        ValueError: the file cannot be written.
    """
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with written_whole(path) as draft:
        save_tensors(draft, plain, metadata)
