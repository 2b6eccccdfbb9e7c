"""Reads pickles of numpy arrays, and nothing else, from packages that are never imported."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch


def _empty_array(_subtype: type, shape: tuple[int, ...], dtype: bytes) -> np.ndarray[Any, Any]:
    return np.ndarray(shape, dtype.decode())


class _NumpyOnlyUnpickler(pickle.Unpickler):
    """Reads dictionaries of numpy arrays and refuses every other global, so that no code can run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
        }:
            return _empty_array
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        raise pickle.UnpicklingError(f"weights may hold numpy arrays only, found {module}.{name}")


def read_arrays(path: Path) -> Any:
    """The nested dictionaries of arrays in a pickle.

    Raises:
        Exception: whatever a damaged pickle leads to; ``UnpicklingError`` for anything but numpy arrays.
    """
    with path.open("rb") as file:
        return _NumpyOnlyUnpickler(file).load()


def to_tensor(value: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """A float32 array as a tensor.

    Raises:
        ValueError: it is none, or has another shape.
    """
    if not isinstance(value, np.ndarray) or value.dtype != np.float32 or value.shape != shape:
        raise ValueError(f"expected a float32 array of shape {shape}, got {getattr(value, 'shape', value)}")
    return torch.from_numpy(value.copy())


def file_in_package(package: str, *parts: str) -> Path | None:
    """A file of an installed package, found without importing it; None if there is none."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, *parts)
        if path.is_file():
            return path
    return None
