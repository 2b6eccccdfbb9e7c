"""Stages and presets from outside the package get names, and lose them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

import dit_accel
from dit_accel import Recipe, presets
from dit_accel.recipe import NAMES
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.mass import Mass
from dit_accel.stages.select.protocol import Select


@dataclass(frozen=True)
class Halved(Mass):
    """A subclass of a selection that is here already."""


def test_a_subclass_without_a_name_runs_and_cannot_be_written() -> None:
    recipe = Recipe(select=Halved(density=0.4))
    assert recipe != Recipe(select=Mass(density=0.4))
    assert recipe.with_fields({"select.density": 0.2}).select == Halved(density=0.2)
    with pytest.raises(ValueError, match=r"Halved \(select\) has no name to write; .* dit_accel\.register"):
        recipe.to_dict()


def test_a_name_is_given_and_taken_back() -> None:
    assert dit_accel.register("halved")(Halved) is Halved
    recipe = Recipe().with_fields({"select": "halved", "select.density": "0.4"})
    assert recipe == Recipe(select=Halved(density=0.4))
    data = json.loads(json.dumps(recipe.to_dict()))
    assert data["select"]["from"] == __name__
    assert Recipe.from_dict(data) == recipe
    dit_accel.unregister("halved", Halved)
    # Of a name that no file brings along, only how names come in general can be said.
    with pytest.raises(ValueError, match=r"Unknown select 'halved'; known are dense, .*\. Others come with a module"):
        Recipe().with_fields({"select": "halved"})
    with pytest.raises(ValueError, match="Halved is not the select 'halved'"):
        dit_accel.unregister("halved", Halved)


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match=rf"The select 'mass' is dit_accel's own already, got {__name__}\.Halved"):
        dit_accel.register("mass")(Halved)
    with pytest.raises(ValueError, match="The recipe 'auto' is dit_accel's own already"):
        dit_accel.register("auto")(lambda: Recipe())
    dit_accel.register("mine")(Halved)
    try:

        @dataclass(frozen=True)
        class Other(Mass):
            pass

        with pytest.raises(ValueError, match=rf"The select 'mine' is {__name__}\.Halved already, got .*Other"):
            dit_accel.register("mine")(Other)
        assert NAMES["select"].get("mine") is Halved
        # The same place once more is a module loaded anew, or a notebook's cell.
        again = dataclass(frozen=True)(type("Halved", (Mass,), {"__module__": __name__, "__qualname__": "Halved"}))
        dit_accel.register("mine")(again)
        assert NAMES["select"].get("mine") is again
        # Axes have names of their own.
        assert "mine" not in NAMES["order"]
    finally:
        dit_accel.unregister("mine", NAMES["select"].get("mine"))


class NoDataclass(Select):
    pass


@dataclass
class Thawed(Select):
    pass


@dataclass(frozen=True)
class NoDefault(Select):
    share: float


@dataclass(frozen=True)
class Plain:
    pass


@dataclass(frozen=True)
class Later(Schedule):
    pass


@pytest.mark.parametrize(
    ("thing", "sentence"),
    [
        (NoDataclass, "NoDataclass must be a frozen dataclass"),
        (Thawed, "Thawed must be a frozen dataclass"),
        (NoDefault, r"NoDefault\.share needs a default"),
        (Plain, "must inherit from one of Order, Select, Compensation, Precision, Reuse, got Plain"),
        (Later, "must inherit from one of Order, .*, got Later"),
        (lambda density: Recipe(), "The option density of a preset needs a default"),
        (Halved(), r"A preset must be a function that returns a Recipe, got Halved\("),
    ],
)
def test_what_can_have_no_name(thing: Any, sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        dit_accel.register("mine")(thing)


@pytest.mark.parametrize("name", ["", "my select", "a;b", "select=1", "_x", "1st", "mine.json"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ValueError, match="The name of a select must be letters, digits"):
        dit_accel.register(name)(Halved)


def test_register_takes_a_name_first() -> None:
    with pytest.raises(TypeError, match="register takes a name"):
        dit_accel.register(Halved)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ({"select": Thawed()}, "Thawed must be a frozen dataclass"),
        ({"select": Plain()}, "Recipe.select must be one of DenseSelect, .*, or another Select, got Plain"),
        ({"schedule": Later()}, r"Recipe.schedule must be one of Schedule, got Later"),
        ({"order": Halved()}, "Recipe.order must be one of Raster, .*, or another Order, got Halved"),
    ],
)
def test_what_a_recipe_cannot_hold(stages: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        Recipe(**stages)


def test_a_preset_of_others() -> None:
    @dit_accel.register("mine")
    def mine(density: float = 0.3, *, block: tuple[int, int] = (64, 64)) -> Recipe:
        return presets.mass(density=density, block=block)

    @dit_accel.register("broken")
    def broken() -> Recipe:
        return 1  # type: ignore[return-value]

    try:
        assert presets.resolve("mine", block=(32, 32)).select.block == (32, 32)
        with pytest.raises(ValueError, match="'mine' has no option 'top_p'; its options are density, block"):
            presets.resolve("mine", top_p=0.3)
        with pytest.raises(TypeError, match="The preset 'broken' must return a Recipe, got 1"):
            presets.resolve("broken")
    finally:
        dit_accel.unregister("mine", mine)
        dit_accel.unregister("broken", broken)
