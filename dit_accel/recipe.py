"""A recipe: one choice on each of the six axes, as plain data."""

from __future__ import annotations

import ast
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .files import write_text
from .names import MissingName, Names, home_of
from .stages.compensate.agent import AgentTokens
from .stages.compensate.carried import Carried
from .stages.compensate.clipped import ClippedSoftmax
from .stages.compensate.coarse import CoarseBranch
from .stages.compensate.linear import LinearBranch
from .stages.compensate.none import NoCompensation
from .stages.compensate.output_gate import OutputGate
from .stages.compensate.pooled_mass import PooledMass
from .stages.compensate.protocol import Compensation
from .stages.compensate.pyramid import KeyPyramid
from .stages.compensate.residual import PooledResidual
from .stages.compensate.routed_heads import RoutedHeads
from .stages.order.axes import AxisOrder, ChosenAxes, Chunks
from .stages.order.cubes import Cubes
from .stages.order.curve import Curve
from .stages.order.protocol import Order
from .stages.order.simple import Raster, Tiles
from .stages.order.sorted import SortedSegments
from .stages.precision import PRECISIONS, ModelDtype, Precision
from .stages.reuse.energy import Energy
from .stages.reuse.first_block import FirstBlock
from .stages.reuse.forecast import Forecast
from .stages.reuse.listed import Listed
from .stages.reuse.magnitude import Magnitude
from .stages.reuse.none import NoReuse
from .stages.reuse.protocol import Reuse
from .stages.schedule import SCHEDULES, Schedule
from .stages.select.gate import GlobalGate
from .stages.select.grid import Circle, Radial, TileWindow
from .stages.select.head_rules import HeadRules
from .stages.select.learned import Learned
from .stages.select.mass import FrozenMass, Mass
from .stages.select.pooled import Pooled
from .stages.select.protocol import Select
from .stages.select.rectified import Reallocated
from .stages.select.sampled import Sampled
from .stages.select.similarity_gate import GatedPooled
from .stages.select.static import DenseSelect, FullSelect, Window

ORDERS: dict[str, type[Order]] = {
    "raster": Raster,
    "tiles": Tiles,
    "cubes": Cubes,
    "axes": AxisOrder,
    "chunks": Chunks,
    "chosen_axes": ChosenAxes,
    "curve": Curve,
    "sorted": SortedSegments,
}
SELECTS: dict[str, type[Select]] = {
    "dense": DenseSelect,
    "full": FullSelect,
    "window": Window,
    "pooled": Pooled,
    "learned": Learned,
    "gated_pooled": GatedPooled,
    "mass": Mass,
    "frozen_mass": FrozenMass,
    "global_gate": GlobalGate,
    "reallocated": Reallocated,
    "sampled": Sampled,
    "tile_window": TileWindow,
    "head_rules": HeadRules,
    "circle": Circle,
    "radial": Radial,
}
COMPENSATIONS: dict[str, type[Compensation]] = {
    "none": NoCompensation,
    "pooled_mass": PooledMass,
    "key_pyramid": KeyPyramid,
    "linear": LinearBranch,
    "coarse": CoarseBranch,
    "gate": OutputGate,
    "clipped": ClippedSoftmax,
    "heads": RoutedHeads,
    "agents": AgentTokens,
    "residual": PooledResidual,
    "carried": Carried,
}
REUSES: dict[str, type[Reuse]] = {
    "none": NoReuse,
    "first_block": FirstBlock,
    "magnitude": Magnitude,
    "forecast": Forecast,
    "energy": Energy,
    "listed": Listed,
}
AXES: dict[str, Mapping[str, type[Any]]] = {
    "order": ORDERS,
    "select": SELECTS,
    "compensate": COMPENSATIONS,
    "precision": PRECISIONS,
    "schedule": SCHEDULES,
    "reuse": REUSES,
}
PROTOCOLS: dict[str, type[Any]] = {
    "order": Order,
    "select": Select,
    "compensate": Compensation,
    "precision": Precision,
    "reuse": Reuse,
}
"""By axis that others may add kinds to, what every kind inherits from."""


def _check_stage(axis: str, kind: object) -> None:
    """Raise TypeError for a class that a recipe cannot hold."""
    protocol = PROTOCOLS[axis]
    # Not issubclass(), which protocols with attributes do not allow.
    if not isinstance(kind, type) or protocol not in kind.__mro__:
        raise TypeError(f"The {axis} of a recipe must be a class that inherits from {protocol.__name__}, got {kind!r}.")
    if not is_dataclass(kind) or not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise TypeError(
            f"{kind.__name__} must be a frozen dataclass: recipes are compared, hashed and written to files."
        )
    for one in fields(kind):
        if one.default is MISSING and one.default_factory is MISSING:
            raise TypeError(f"{kind.__name__}.{one.name} needs a default: a recipe can name a kind alone.")


GROUPS = {
    "order": "dit_accel.orders",
    "select": "dit_accel.selections",
    "compensate": "dit_accel.compensations",
    "precision": "dit_accel.precisions",
    "reuse": "dit_accel.reuses",
}
"""By axis that others may add kinds to, the group of entry points that declare them."""
NAMES: dict[str, Names[type[Any]]] = {
    axis: Names(axis, AXES[axis], group, partial(_check_stage, axis)) for axis, group in GROUPS.items()
}


def kinds_of(axis: str) -> Names[type[Any]] | Mapping[str, type[Any]]:
    """The kinds on an axis by name, also those of others."""
    return NAMES[axis] if axis in NAMES else AXES[axis]


# More than any length of a grid or number of layers, and far from overflows where some are multiplied.
LARGEST = 2**20


@dataclass(frozen=True)
class Recipe:
    """How attention is computed: comparable, hashable, printable and serialisable.

    Attributes:
        order: in which order tokens form blocks.
        select: which key blocks a query block reads.
        compensate: what stands in for the blocks left out.
        precision: in what numbers.
        schedule: when attention is dense, and when a plan is made anew.
        reuse: which steps take an earlier one's result in place of running all blocks.
    """

    order: Order = field(default_factory=Raster)
    select: Select = field(default_factory=DenseSelect)
    compensate: Compensation = field(default_factory=NoCompensation)
    precision: Precision = field(default_factory=ModelDtype)
    schedule: Schedule = field(default_factory=Schedule)
    reuse: Reuse = field(default_factory=NoReuse)

    def __post_init__(self) -> None:
        for axis, kinds in AXES.items():
            value = getattr(self, axis)
            if type(value) not in kinds.values():
                if axis not in PROTOCOLS or PROTOCOLS[axis] not in type(value).__mro__:
                    allowed = ", ".join(kind.__name__ for kind in kinds.values())
                    others = f", or another {PROTOCOLS[axis].__name__}" if axis in PROTOCOLS else ""
                    raise TypeError(f"Recipe.{axis} must be one of {allowed}{others}, got {value!r}.")
                _check_stage(axis, type(value))
            _check_numbers(axis, value)
        conflicts = (
            self.order.conflicts_with(self.select),
            self.compensate.conflicts_with(self.select),
            self.precision.conflicts_with(self.select, self.compensate),
            self.schedule.conflicts_with(self.select, self.compensate),
        )
        for conflict in conflicts:
            if conflict is not None:
                raise ValueError(conflict)

    @property
    def spans_references(self) -> bool:
        """Whether pairs with tokens of references are selected like others; else references are read in full."""
        stages = (self.order, self.compensate)
        return not self.select.is_static and all(stage.spans_references for stage in stages)

    @property
    def is_of_one_model(self) -> bool:
        """Whether it holds what was made for the layers of a certain model."""
        return self.order.is_of_one_model or bool(self.select.head_densities) or self.compensate.is_learned

    def with_fields(self, changes: Mapping[str, Any]) -> Recipe:
        """A copy with single fields changed, by dotted name, e.g. ``{"select.density": 0.1}``.

        A bare axis replaces the whole value by a kind with its defaults, e.g. ``{"order": "tiles"}``. Values
        given as text are read as Python literals.

        Raises:
            ValueError: unknown axis, kind or field, or a value that the field does not allow.
        """
        stages = {axis: getattr(self, axis) for axis in AXES}
        fields_of: dict[str, dict[str, Any]] = {}
        for name, value in changes.items():
            axis, _, field_name = name.partition(".")
            _check_axis(axis)
            if field_name:
                fields_of.setdefault(axis, {})[field_name] = value
            else:
                stages[axis] = _kind(axis, value)()
        # After the kinds, and all fields of a stage at once: one by one they might not go together.
        for axis, values in fields_of.items():
            stages[axis] = _replace_fields(axis, stages[axis], values)
        return Recipe(**stages)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain data for JSON; the inverse of :meth:`from_dict`.

        Of a kind that is not this package's the module is written too, as ``"from"``: a message can then say what to
        import. Reading imports nothing, since a file must not run code.

        Raises:
            ValueError: a kind has no name; see :func:`dit_accel.register`.
        """
        return {axis: _stage_to_dict(axis, getattr(self, axis)) for axis in AXES}

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, Any]]) -> Recipe:
        """Build a recipe from :meth:`to_dict`'s data, also after a round trip through JSON.

        Raises:
            ValueError: unknown axis, kind or field.
        """
        stages = {}
        for axis, values in data.items():
            _check_axis(axis)
            changes = {name: value for name, value in values.items() if name not in ("kind", "from")}
            stages[axis] = _replace_fields(axis, _kind(axis, values.get("kind"), values.get("from"))(), changes)
        return cls(**stages)

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_dict`'s data as JSON; folders are made.

        Raises:
            ValueError: the file cannot be written; one that was there is untouched.
        """
        write_text(Path(path), json.dumps(self.to_dict()) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a file of :meth:`save`. Axes but the selection may be left out, and are then the plainest.

        Raises:
            ValueError: the file is not there, or holds no recipe; the message names the file.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"There is no recipe file {path}.")
        try:
            # Editors may begin a file with a byte order mark.
            data = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} holds no recipe: {error}.") from error
        if not isinstance(data, dict) or not all(isinstance(values, dict) for values in data.values()):
            raise ValueError(f"{path} holds no recipe: one object of six axes is expected.")
        try:
            recipe = cls.from_dict(data)
        except MissingName as error:
            raise MissingName(f"{path}: {error}") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no recipe: {error}") from error
        # What names no selection would run dense without a word.
        if "select" not in data:
            raise ValueError(f"{path} holds no recipe: it has no select, which chooses the blocks to read.")
        return recipe


def _check_numbers(axis: str, stage: Any) -> None:
    """Refuse what no grid has and what tensors of 64-bit integers cannot count."""
    for one in fields(stage):
        limit = 2**63 if one.name == "seed" else LARGEST
        value = getattr(stage, one.name)
        # Written so that NaN fails too.
        if not all(abs(number) < limit for number in _numbers(value)):
            raise ValueError(f"{axis}.{one.name} must be finite and below {limit}, got {value}.")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)):
        yield value


def _check_axis(axis: str) -> None:
    if axis not in AXES:
        raise ValueError(f"Unknown axis {axis!r}; the axes are {', '.join(AXES)}.")


def _kind(axis: str, name: Any, home: Any = None) -> type[Any]:
    kinds = kinds_of(axis)
    if isinstance(kinds, Names):
        return kinds.get(name, home)
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"Unknown {axis} {name!r}; known are {', '.join(kinds)}.")
    return kinds[name]


def name_of_kind(axis: str, kind: type[Any]) -> str | None:
    """The name of a kind on an axis; None where nobody gave it one."""
    kinds = kinds_of(axis)
    if isinstance(kinds, Names):
        return kinds.name_of(kind)
    return next((name for name, own in kinds.items() if own is kind), None)


def _stage_to_dict(axis: str, stage: Any) -> dict[str, Any]:
    kind = type(stage)
    name = name_of_kind(axis, kind)
    if name is None:
        raise ValueError(f"{kind.__name__} ({axis}) has no name to write; give it one with dit_accel.register.")
    home = home_of(kind)
    return {
        "kind": name,
        **({} if home is None else {"from": home}),
        **{one.name: getattr(stage, one.name) for one in fields(stage)},
    }


def _replace_fields(axis: str, stage: Any, changes: Mapping[str, Any]) -> Any:
    known = {f.name: f for f in fields(stage)}
    types = typing.get_type_hints(type(stage))
    for name in changes:
        if name not in known:
            allowed = ", ".join(known) or "none"
            raise ValueError(f"{type(stage).__name__} ({axis}) has no field {name!r}; its fields are {allowed}.")
    values = {name: _read(f"{axis}.{name}", value, types[name]) for name, value in changes.items()}
    return replace(stage, **values)


def _read(name: str, value: Any, hint: Any) -> Any:
    """Bring text and JSON lists to the field's type."""
    if isinstance(value, str) and hint is not str:
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise ValueError(f"{name} must be a Python literal such as 0.2 or (4, 4, 4), got {value!r}.") from None
    value = _as_tuples(value)
    if not _matches(value, hint):
        raise ValueError(f"{name} must be {_spell(hint)}, got {value!r}.")
    return value


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _matches(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(args) == 2 and args[1] is ...:
            return all(_matches(item, args[0]) for item in value)
        return len(value) == len(args) and all(map(_matches, value, args))
    if args:  # a union
        return any(_matches(value, arg) for arg in args)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _spell(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)
