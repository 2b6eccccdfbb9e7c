"""Nothing stands in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .protocol import Compensation


@dataclass(frozen=True)
class NoCompensation(Compensation):
    """Left-out blocks are left out: the softmax runs over the kept keys alone."""

    is_static: ClassVar[bool] = True
    allows_pairs: ClassVar[bool] = True
    goes_round: ClassVar[bool] = True
