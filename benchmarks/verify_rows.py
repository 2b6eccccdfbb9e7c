"""The rows of ``benchmarks/verify_presets.py``: every preset at a density, every profile, and plans of several ages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from dit_accel import Recipe, presets
from dit_accel.presets import PRESETS
from dit_accel.stages.order.simple import Tiles
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.mass import Mass

from .fidelity_presets import DENSE, METHODS, Method

PROFILES = ("balanced", "fast", "max")
# Of a run: more than any has.
ONE_PLAN = 1000
REFRESH = (1, 2, 4, 8, ONE_PLAN)
REFRESH_DENSITY = 0.3


@dataclass(frozen=True)
class Row:
    """One recipe of the table.

    Attributes:
        name: of the row.
        method: whose recipe it is.
        density: that was asked for; None where the method has none to set.
    """

    name: str
    method: Method
    density: float | None

    @classmethod
    def of(cls, method: Method, density: float | None) -> Row:
        """A method at a density, named by both."""
        return cls(method.name if density is None else f"{method.name}@{density:g}", method, density)


def preset_methods() -> list[Method]:
    """Every preset that runs sparse: those of the fidelity sweep, and as they are those that it leaves out."""
    swept = [method for method in METHODS if method.name in PRESETS]
    left = [name for name in PRESETS if name not in {one.name for one in swept} and name not in ("dense", *PROFILES)]
    return [*swept, *(Method(name, PRESETS[name], fixed=True) for name in left)]


def profile_methods() -> list[Method]:
    """The profiles, as users call them."""
    return [Method(name, PRESETS[name], fixed=True) for name in PROFILES]


def refresh_methods() -> list[Method]:
    """Blocks by exact mass whose plan serves so many steps."""
    return [Method(refresh_name(age), partial(_of_age, age)) for age in REFRESH]


def refresh_name(age: int) -> str:
    """Of the row of plans that serve so many steps."""
    return "plan-once" if age == ONE_PLAN else f"plan-{age}"


def _of_age(age: int, density: float) -> Recipe:
    select = Mass(density=density, head_adaptive=False, block=presets.mass().select.block)
    return Recipe(order=Tiles(), select=select, schedule=Schedule(dense_fraction=DENSE, refresh_every=age))


def all_methods() -> dict[str, Method]:
    """Methods by name."""
    everything = [*profile_methods(), *preset_methods(), *refresh_methods()]
    return {method.name: method for method in everything}


def rows_of(names: Sequence[str], densities: Sequence[float]) -> list[Row]:
    """Rows of methods at densities: fixed ones once, those of plans at :data:`REFRESH_DENSITY`.

    Raises:
        ValueError: an unknown name.
    """
    known, found = all_methods(), []
    ages = {method.name for method in refresh_methods()}
    for name in names:
        if name not in known:
            raise ValueError(f"Unknown method {name!r}; known are {', '.join(known)}.")
        method = known[name]
        asked = (None,) if method.fixed else (REFRESH_DENSITY,) if name in ages else densities
        found += [Row.of(method, density) for density in asked]
    return found
