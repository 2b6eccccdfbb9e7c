"""Settings as plain data: to keep in a file, and to name the first in which two runs differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

ABSENT = "nothing"
LONGEST = 80


def as_plain(value: Any) -> Any:
    """A value as JSON gives it back. Tensors and arrays become a digest of their contents."""
    return json.loads(json.dumps(value, default=_spelled))


def digest(*values: Any) -> str:
    """SHA-256 of the contents of tensors, sequences, mappings and plain values, the same on every device."""
    sums = hashlib.sha256()
    for value in values:
        _feed(sums, value)
    return sums.hexdigest()


def first_difference(there: Any, here: Any, shared: bool = False) -> str | None:
    """The first value that differs, such as ``select.density = 0.05, got 0.5``; None if all are equal.

    Args:
        there, here: nested plain data, as :func:`as_plain` makes it.
        shared: compare only names that both have.
    """
    found = _difference(there, here, shared, "")
    return None if found is None else found.removeprefix(".")


def _difference(there: Any, here: Any, shared: bool, path: str) -> str | None:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        names = [*here, *(name for name in there if name not in here)]
        pairs = [
            (name, there.get(name, ABSENT), here.get(name, ABSENT))
            for name in names
            if not shared or (name in there and name in here)
        ]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(place, *both) for place, both in enumerate(zip(there, here, strict=True))]
    else:
        return None if there == here else f"{path} = {_short(there)}, got {_short(here)}"
    found = (_difference(was, now, shared, f"{path}.{name}") for name, was, now in pairs)
    return next((difference for difference in found if difference is not None), None)


def _feed(sums: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().flatten()
        sums.update(f"{value.dtype} {tuple(value.shape)}".encode())
        sums.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for name in sorted(value):
            sums.update(name.encode())
            _feed(sums, value[name])
    elif isinstance(value, (list, tuple)):
        sums.update(str(len(value)).encode())
        for item in value:
            _feed(sums, item)
    elif hasattr(value, "tobytes"):
        sums.update(value.tobytes())
    else:
        sums.update(repr(value).encode())


def _spelled(value: Any) -> str:
    if isinstance(value, torch.Tensor) or hasattr(value, "tobytes"):
        return f"sha256 {digest(value)[:16]}"
    return str(value)


def _short(value: Any) -> str:
    text = value if value is ABSENT else repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
