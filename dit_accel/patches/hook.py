"""What all hooks of a patch have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def inert(*args: Any, **kwargs: Any) -> None:
    """What a hook becomes in a copy or a pickle of a patched model: the copy is not patched."""


def _make_inert() -> Callable[..., None]:
    return inert


class Hook:
    """A hook that a copy of the model does not keep."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _make_inert, ()
