"""Every forward runs all blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .protocol import Reuse


@dataclass(frozen=True)
class NoReuse(Reuse):
    """No step takes anything of another's blocks."""

    is_none: ClassVar[bool] = True
