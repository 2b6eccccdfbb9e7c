"""The adapter that a command loads: found, and found whole, before the model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..pipelines.builtin import Builtin
    from ..recipe import Recipe
    from .settings import Asked


def find_adapter(name_or_path: str, builtin: Builtin | None) -> Path:
    """An adapter: one that comes with a built-in model, or the user's own, or a published checkpoint.

    Raises:
        ValueError: there is none.
    """
    offered = {} if builtin is None else builtin.adapters
    if name_or_path in offered:
        return offered[name_or_path]
    folder = Path(name_or_path)
    if not folder.exists():
        known = f"the model's own are {', '.join(offered)}" if offered else "the model comes with none"
        raise ValueError(f"There is no adapter {name_or_path!r}: it is no folder, and {known}.")
    return folder


def adapter_recipe(folder: Path) -> Recipe:
    """The recipe of an adapter, whose card and tensors are looked at without the model; dense for a published
    checkpoint, which is told by the model and of which only the files are looked at.

    Raises:
        ValueError: they are missing or damaged.
    """
    from ..recipe import Recipe
    from ..training.adapter_files import read_adapter
    from ..training.published.files import is_own, refuse_unreadable

    if not is_own(folder):
        refuse_unreadable(folder)
        return Recipe()
    return read_adapter(folder).recipe


def settings_of_adapter(folder: Path, asked: Asked | None) -> dict[str, float]:
    """Steps and guidance of an adapter that was distilled to few steps, or what was asked for; of any other nothing.

    A published checkpoint tells its steps by the model alone.

    Args:
        asked: None where that is for the dense side of a comparison.
    """
    from ..training.adapter_files import read_adapter
    from ..training.published.files import is_own

    steps = read_adapter(folder).steps if is_own(folder) else None
    if steps is None:
        return {}
    own = {"steps": len(steps.sigmas), "guidance": 1.0}
    return {name: value if getattr(asked, name, None) is None else getattr(asked, name) for name, value in own.items()}
