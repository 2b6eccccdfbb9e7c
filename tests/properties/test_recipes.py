"""A recipe survives every way in which it is written down."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dit_accel import Recipe, presets
from dit_accel.cli.options import read_recipe
from dit_accel.recipe import AXES
from tests.properties.drawn import spelled, times
from tests.properties.drawn_recipes import recipes

every = st.one_of(st.sampled_from([presets.resolve(name) for name in presets.PRESETS]), recipes())


def changes_to(recipe: Recipe) -> dict[str, Any]:
    """Every kind and field by name."""
    kinds = {axis: values["kind"] for axis, values in recipe.to_dict().items()}
    fields = {
        f"{axis}.{field.name}": getattr(stage, field.name)
        for axis in AXES
        for stage in [getattr(recipe, axis)]
        for field in dataclasses.fields(stage)
    }
    return {**kinds, **fields}


@given(every)
def test_a_recipe_survives_its_dictionary_and_json(recipe: Recipe | None):
    assume(recipe is not None)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert repr(again) == repr(recipe)


@times(1 / 2)
@given(every)
def test_a_recipe_survives_a_file(recipe: Recipe | None):
    assume(recipe is not None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deeper" / "recipe.json"
        recipe.save(path)
        assert Recipe.load(path) == recipe
        assert presets.resolve(str(path)) == recipe


@given(every, every, st.randoms(use_true_random=False))
def test_any_recipe_is_any_other_with_its_fields(recipe: Recipe | None, start: Recipe | None, chance: Any):
    assume(recipe is not None)
    assume(start is not None)
    named = list(changes_to(recipe).items())
    chance.shuffle(named)
    assert start.with_fields(dict(named)) == recipe
    assert start.with_fields({name: spelled(value) for name, value in named}) == recipe


@given(every)
def test_the_command_line_reads_what_a_recipe_says(recipe: Recipe | None):
    assume(recipe is not None)
    changes = [f"{name}={spelled(value)}" for name, value in changes_to(recipe).items()]
    assert read_recipe("pooled", changes) == recipe
    assert read_recipe("pooled", [change.replace("=", " = ", 1) for change in changes]) == recipe


@pytest.mark.parametrize("name", presets.PRESETS)
@settings(max_examples=3)
@given(data=st.data())
def test_fields_of_a_preset_change_alone(name: str, data: Any):
    recipe = presets.resolve(name)
    axis = data.draw(st.sampled_from([axis for axis in AXES if dataclasses.fields(getattr(recipe, axis))]))
    field = data.draw(st.sampled_from(dataclasses.fields(getattr(recipe, axis))))
    value = getattr(getattr(recipe, axis), field.name)
    assert recipe.with_fields({f"{axis}.{field.name}": value}) == recipe
    assert recipe.with_fields({f"{axis}.{field.name}": spelled(value)}) == recipe
    for other in AXES:
        changed = recipe.with_fields({f"{axis}.{field.name}": spelled(value)})
        assert getattr(changed, other) == getattr(recipe, other)
