"""The dtype of weights, in the words of the diffusers that is installed."""

from __future__ import annotations

from typing import Any

# Before, the argument was `torch_dtype`, and another name was ignored; since then the old name gives a warning.
RENAMED_IN = (0, 40)


def dtype_argument(dtype: Any) -> dict[str, Any]:
    """The keyword argument of ``from_pretrained`` for a dtype, or for a dictionary of them by component."""
    import diffusers

    installed = tuple(int(part) for part in diffusers.__version__.split(".")[:2])
    return {"dtype" if installed >= RENAMED_IN else "torch_dtype": dtype}
