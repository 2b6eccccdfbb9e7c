import inspect
import json
import re
from pathlib import Path

import pytest

from dit_accel import Recipe, presets
from dit_accel.recipe import AXES
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.select.pooled import Pooled

ALL = [presets.resolve(name) for name in presets.PRESETS]


@pytest.mark.parametrize("recipe", ALL, ids=list(presets.PRESETS))
def test_a_recipe_survives_json(recipe):
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    assert hash(recipe) == hash(Recipe.from_dict(recipe.to_dict()))


def test_fields_by_name():
    recipe = presets.pooled().with_fields(
        {
            "select.density": "0.05",
            "order": "raster",
            "schedule.refresh_at": "(0.2, 0.5)",
            "select.top_p": 0.9,
        }
    )
    assert recipe.order == Raster()
    assert recipe.select == Pooled(density=0.05, top_p=0.9)
    assert recipe.schedule.refresh_at == (0.2, 0.5)
    # fields that only go together, whatever the order given
    for changes in ({"select.density": None, "select.top_p": 0.9}, {"select.top_p": 0.9, "select.density": None}):
        assert presets.pooled().with_fields(changes).select == Pooled(density=None, top_p=0.9)
    dense = {"schedule.plan_in_dense_phase": True, "schedule.dense_refresh": True}
    assert Recipe().with_fields(dense).schedule.plan_in_dense_phase
    # a kind first, then its fields, whatever the order given
    assert Recipe().with_fields({"order.shape": (2, 8, 8), "order": "tiles"}).order == Tiles((2, 8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select.densty": 0.1}, "no field 'densty'; its fields are density, top_p"),
        ({"selct.density": 0.1}, "Unknown axis 'selct'; the axes are order, select"),
        ({"order": "zigzag"}, "Unknown order 'zigzag'; known are raster, tiles"),
        ({"select.density": "2"}, r"select.density must lie in \(0, 1\], got 2"),
        ({"select.density": 0}, r"select.density must lie in \(0, 1\], got 0"),
        ({"select.density": "lots"}, "must be a Python literal such as 0.2"),
        ({"select.density": "'lots'"}, "select.density must be .*float.*, got 'lots'"),
        ({"order.shape": "(4, 4)"}, r"order.shape must be tuple\[int, int, int\], got \(4, 4\)"),
        ({"select.density": None}, "needs a density, a top_p, or both"),
    ],
)
def test_bad_fields(changes, message):
    with pytest.raises(ValueError, match=message):
        presets.pooled().with_fields(changes)


def test_bad_presets_and_options():
    with pytest.raises(ValueError, match="Unknown recipe 'faster'; known are dense, window, pooled"):
        presets.resolve("faster")
    with pytest.raises(ValueError, match=r"Unknown recipe 'mass:density=.3': options stand beside the name, as in"):
        presets.resolve("mass:density=.3")
    with pytest.raises(ValueError, match="'pooled' has no option 'sparsity'; its options are density"):
        presets.resolve("pooled", sparsity=0.9)
    with pytest.raises(ValueError, match="go with a preset's name"):
        presets.resolve(Recipe(), density=0.1)
    with pytest.raises(TypeError, match=r"Recipe\.order must be one of Raster, Tiles, .*, got 'tiles'"):
        Recipe(order="tiles")


def test_the_automatic_recipe_is_that_of_the_fidelity_page():
    own = {"schedule.own_dense": True}
    assert presets.automatic() == presets.mass(density=0.3, means=True).with_fields(own)
    assert presets.automatic(density=0.1, means=False) == presets.mass(density=0.1).with_fields(own)
    assert presets.automatic(in_pipeline=False) == presets.pooled(density=0.3)
    with pytest.raises(ValueError, match="no option 'sparsity'"):
        presets.automatic(sparsity=0.9)


PAGE = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", presets.PRESETS)
def test_the_page_of_recipes_has_every_preset_as_it_is(name):
    parameters = inspect.signature(presets.PRESETS[name]).parameters.values()
    assert all(parameter.default is not parameter.empty for parameter in parameters), "a preset needs no argument"
    written = f"{name}({', '.join(f'{p.name}={p.default!r}' for p in parameters)})"
    assert f"\n### `{written}`\n" in PAGE
    section = PAGE.split(f"\n### `{written}`\n")[1].split("\n### ")[0]
    kinds = {axis: values["kind"] for axis, values in presets.resolve(name).to_dict().items() if axis != "schedule"}
    if kinds["reuse"] == "none":
        del kinds["reuse"]  # as in all but the profiles of whole runs
    line = "Axes: " + ", ".join(f"{axis} `{kind}`" for axis, kind in kinds.items()) + "."
    assert line in section
    # Names in the docstring are roles of Sphinx, those of the page plain.
    said = (inspect.getdoc(presets.PRESETS[name]) or "").split("\n\n")[0].replace("``", "`")
    said = re.sub(r":\w+:`~?(?:\w+\.)*(\w+)`", r"`\1`", said)
    assert " ".join(said.split()) in " ".join(section.split())


def test_the_page_of_recipes_has_no_preset_that_is_gone():
    assert sorted(re.findall(r"\n### `(\w+)\(", PAGE)) == sorted(presets.PRESETS)


@pytest.mark.parametrize("axis", [axis for axis in AXES if axis != "schedule"])
def test_the_page_of_recipes_has_every_value_of_an_axis(axis):
    row = re.search(rf"^\| {axis} \|(.*)\|$", PAGE, re.MULTILINE)
    assert row is not None
    # What stands in parentheses explains.
    assert sorted(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", row[1]))) == sorted(AXES[axis])


def test_a_file_gives_the_recipe_back(tmp_path):
    recipe = presets.pooled(density=0.1)
    recipe.save(tmp_path / "deep" / "r.json")
    assert Recipe.load(tmp_path / "deep" / "r.json") == recipe
    (tmp_path / "edited.json").write_text(json.dumps(recipe.to_dict(), indent=2), encoding="utf-8-sig")
    assert presets.resolve(str(tmp_path / "edited.json")) == recipe
    (tmp_path / "short.json").write_text(json.dumps({"select": {"kind": "pooled", "density": 0.1}}))
    assert Recipe.load(tmp_path / "short.json") == Recipe(select=Pooled(density=0.1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "it has no select"),
        ('{"order": {"kind": "tiles"}}', "it has no select"),
        ("[]", "one object of six axes is expected"),
        ("3", "one object of six axes is expected"),
        ('{"select": "pooled"}', "one object of six axes is expected"),
        ('{"select": {}}', "Unknown select None; known are dense"),
        ('{"select": {"kind": ["pooled"]}}', r"Unknown select \['pooled'\]"),
        ('{"select": {"kind": "pooled"}, "speed": {"kind": "fast"}}', "Unknown axis 'speed'"),
        ('{"select": {"kind": "pooled", "densty": 0.1}}', "has no field 'densty'"),
        ('{"select": {"kind": "pooled", "density": NaN}}', r"select.density must lie in \(0, 1\], got nan"),
        ('{"select": {"kind": "pooled", "density": {}}}', "select.density must be .*, got {}"),
        ('{"select": {"kind": "window"}, "compensate": {"kind": "residual"}}', "also hides single tokens"),
        ("", "Expecting value"),
        ('{"select": {"kind": "poo', "Unterminated string"),
        ("[" * 100_000, "recursion|nested"),
        ("\udcff", "can't decode byte 0xff"),
    ],
)
def test_a_file_without_a_recipe_is_named(tmp_path, text, message):
    path = tmp_path / "r.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"r\.json holds no recipe: .*({message})") as caught:
        Recipe.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["(" * 10_000, "{[]: 1}", "-" * 100_000 + "1", "\x00", ""])
def test_text_that_is_no_literal_is_named(value):
    with pytest.raises(ValueError, match="must be a Python literal"):
        Recipe().with_fields({"schedule.refresh_every": value})


def test_a_recipe_that_cannot_be_written_keeps_the_old_one(tmp_path):
    presets.pooled().save(tmp_path / "r.json")
    with pytest.raises(ValueError, match="is a folder"):
        Recipe().save(tmp_path)
    with pytest.raises(ValueError, match=r"Cannot write .*r\.json/deeper\.json"):
        Recipe().save(tmp_path / "r.json" / "deeper.json")
    assert Recipe.load(tmp_path / "r.json") == presets.pooled()


@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        ("window", "order.shape=(1000000000, 1000000000, 1000000000)"),
        ("pooled", "order.shape=(4, 4, 9223372036854775808)"),
        ("pooled", "select.block=(1000000000, 64)"),
        ("window", "select.window=(float, 0.4, 0.4)"),
        ("agent", "compensate.tile=(1000000000, 1000000000, 1000000000)"),
        ("pooled", "schedule.refresh_every=1000000000000000000000000000000"),
        ("clear", "select.radius=9223372036854775808"),
        ("sta", "select.window=(3, 3, 1000000000000000000000000000000)"),
        ("psa", "compensate.seed=1000000000000000000000000000000"),
    ],
)
def test_numbers_that_no_grid_has_are_refused(recipe, field):
    name, value = field.split("=")
    changes = {name: (float("nan"), 0.4, 0.4) if "float" in value else value}
    with pytest.raises(ValueError, match=name):
        presets.resolve(recipe).with_fields(changes)


def test_a_tile_may_be_larger_than_any_grid():
    assert presets.pooled().with_fields({"order.shape": "(1, 1000000, 1000000)"}).order == Tiles((1, 10**6, 10**6))
