"""Methods of a transformer that a patch replaces."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any


class InPlaceOf:
    """Stands in for a method of a transformer; a copy has its own method, as if never replaced."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner = getattr(self.original, "__self__", None)
        copy = memo.get(id(owner))
        return self.original if copy is None else MethodType(getattr(type(copy), self.original.__name__), copy)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        # When a pickle is read, the model has no such attribute yet, and its class's method is found.
        return getattr, (self.original.__self__, self.original.__name__)  # type: ignore[attr-defined]
