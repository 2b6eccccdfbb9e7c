"""What stands in for the key blocks left out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NoCompensation:
    """Left-out blocks are left out: the softmax runs over the kept keys alone."""


COMPENSATIONS: dict[str, type[NoCompensation]] = {"none": NoCompensation}
