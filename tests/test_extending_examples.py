"""The worked examples of stages from outside: what they compute, in files, on the command line, as entry points."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

import dit_accel
from dit_accel import Recipe, presets
from dit_accel.call import AttentionInputs
from dit_accel.cli.main import app
from dit_accel.engine import Engine
from dit_accel.layout import StepContext
from dit_accel.names import MissingName
from dit_accel.recipe import GROUPS
from tests.calls import attend
from tests.stages.block_oracle import LAYOUTS, half_hidden, inputs
from tests.tiny import TINY

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "extending"
COMMANDS = get_command(app).commands
STAGES = {
    "order": ("serpentine", "order", "Serpentine"),
    "select": ("strided", "selection", "Strided"),
    "compensate": ("mean_value", "compensation", "MeanValue"),
    "reuse": ("alternate", "reuse", "Alternate"),
}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The example package, imported; its names are taken back."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    package = importlib.import_module("my_attention")
    yield package
    for name, module, kind in STAGES.values():
        dit_accel.unregister(name, getattr(getattr(package, module), kind))
    dit_accel.unregister("strided_snake", package.preset.strided_snake)
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_attention"]:
        del sys.modules[name]


def python(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    places = os.pathsep.join(map(str, (*paths, ROOT)))
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ) | {"PYTHONPATH": places},
    )


def test_a_file_names_the_module_that_is_missing(example: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    recipe = presets.resolve("strided_snake", every=3)
    recipe.save(path)
    assert Recipe.load(path) == recipe
    code = f"import dit_accel; dit_accel.Recipe.load({str(path)!r})"
    result = python(code, EXAMPLE)
    assert result.returncode != 0
    assert (
        "Unknown order 'serpentine'; known are raster, tiles, cubes, axes, chunks, chosen_axes, curve, sorted. "
        "my_attention.order registers it: import that module first (--import my_attention.order)."
    ) in result.stderr
    assert python(f"import my_attention; {code}", EXAMPLE).returncode == 0
    data = json.loads(path.read_text())
    data["order"] |= {"from": "__main__", "kind": "other"}
    with pytest.raises(MissingName, match="A script registered it: put that into a module"):
        Recipe.from_dict(data)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("layout", ["text first", "image", "alone"])
def test_the_example_computes_what_it_says(example: Any, layout: str, hidden: bool) -> None:
    """Loops in float64: serpentine places, near or every third block, text in full, the mean value mixed in."""
    del example
    place = LAYOUTS[layout]
    recipe = presets.resolve("strided_snake", every=3, strength=0.5, dense_fraction=0.0).with_fields(
        {"select.near": 40, "select.block": (32, 32)}
    )
    q, k = inputs(place)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(5))
    key_mask = half_hidden(place) if hidden else None
    given = AttentionInputs(q, k, v, None if key_mask is None else key_mask[:, None, None])
    engine = Engine(recipe, ["layer"], "auto", 0)
    out = attend(engine, 0, given, place, StepContext(), lambda: pytest.fail("ran dense"))

    frames, height, width = place.grid
    tokens = []
    for f in range(frames):
        for h in range(height):
            row = [place.latent_start + (f * height + h) * width + w for w in range(width)]
            tokens += row[::-1] if h % 2 else row
    latent = set(tokens)
    tokens += [t for t in range(place.seq_len) if t not in latent]
    of = [tokens[first : first + 32] for first in range(0, place.seq_len, 32)]
    text = [any(t not in latent for t in block) for block in of]
    seen = np.ones((len(q), place.seq_len), dtype=bool) if key_mask is None else key_mask.numpy()
    number, kept = len(of), 0
    wanted = torch.empty(q.shape, dtype=torch.float64)
    for b in range(len(q)):
        reads = np.zeros((place.seq_len, place.seq_len), dtype=bool)
        for i, j in itertools.product(range(number), range(number)):
            near = abs(i - j) * 32 <= 40 or j % 3 == 0 or text[i] or text[j]
            if near and seen[b, of[j]].any():
                reads[np.ix_(of[i], of[j])] = seen[b, of[j]]
                kept += 1
        scores = torch.einsum("shd,thd->hst", q[b].double(), k[b].double()) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~torch.from_numpy(reads), -torch.inf).softmax(-1)
        wanted[b] = torch.einsum("hst,thd->shd", weights, v[b].double())
    density = kept / (len(q) * number**2)
    for b in range(len(q)):
        mean = v[b].double()[torch.from_numpy(seen[b])].mean(0)
        wanted[b] += (1 - density) * 0.5 * (mean - wanted[b])
    # The eager kernel's own error plus a few roundings of the mixture.
    assert (out.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert 0.2 < density < 0.95
    assert float(engine.records[0].density_sum) == pytest.approx(density, abs=1e-6)


def test_the_example_runs_in_a_pipeline_and_reuses(example: Any) -> None:
    pipe = TINY["wan"].build()
    recipe = replace(presets.resolve("strided_snake", dense_fraction=0.0), reuse=example.reuse.Alternate())
    with dit_accel.patch(pipe, recipe) as handle:
        TINY["wan"].run(pipe, steps=6)
        summary = handle.summary()
    # Steps 3 and 5 of 6, of both guidance branches.
    assert (summary.computed_forwards, summary.skipped_forwards) == (8, 4)
    assert summary.sparse_calls > 0
    assert not summary.dense_calls


def test_the_command_line_imports_the_example(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del example  # which only cleans up
    monkeypatch.chdir(EXAMPLE)
    bench = ["bench", "--layers", "1", "--size", "64x64", "--frames", "5", "--device", "cpu", "--repeats", "1"]
    found = CliRunner().invoke(
        app, [*bench, "--import", "my_attention", "--recipe", "strided_snake", "--set", "select.every=4", "--json"]
    )
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["recipe"]["select"]["every"] == 4
    found = CliRunner().invoke(app, ["info", "--import", "my_attention", "--device", "cpu", "--json"])
    data = json.loads(found.stdout)
    assert [row["options"]["every"] for row in data["recipes"] if row["name"] == "strided_snake"] == [8]
    for axis, (name, _, _) in STAGES.items():
        assert name in data["axes"][axis]


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (
            "no_such_module",
            "Error: --import no_such_module failed: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        ("breaks", "Error: --import breaks failed: ZeroDivisionError: division by zero"),
    ],
)
def test_an_import_that_fails_is_one_sentence(
    module: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "breaks.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = CliRunner().invoke(app, ["info", "--import", module])
    assert found.exit_code == 2
    assert found.stderr.strip() == sentence


def takes(command: str, flag: str) -> bool:
    return any(flag in one.opts for one in COMMANDS[command].params)


def test_every_command_with_a_recipe_imports() -> None:
    assert {name for name in COMMANDS if takes(name, "--import")} == {
        *(name for name in COMMANDS if takes(name, "--recipe")),
        "info",
        "ui",  # whose page names recipes
    }


@pytest.mark.parametrize("command", [name for name in COMMANDS if takes(name, "--import")])
def test_imports_come_before_anything_is_read(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    more = ["--recipe", "not there"] if command not in ("info", "ui") else []
    more += ["--prompt", "a cat"] if command == "inspect" else []  # which cannot do without
    found = CliRunner().invoke(app, [command, "--import", "breaks", *more])
    assert found.exit_code == 2
    assert found.stderr.strip() == "Error: --import breaks failed: ZeroDivisionError: division by zero"


def test_an_unknown_recipe_says_that_others_are_imported() -> None:
    found = CliRunner().invoke(app, ["generate", "random-wan", "--prompt", "a cat", "--recipe", "strided_snake"])
    assert found.exit_code == 2
    assert "Unknown recipe 'strided_snake'" in found.stderr
    assert "--import MODULE" in found.stderr


def installed(folder: Path, *lines: str) -> Path:
    """A folder with what pip leaves of the example, or of a package with these entry points."""
    text, group = "", False
    for line in lines or (EXAMPLE / "pyproject.toml").read_text().splitlines():
        if line.startswith("["):
            group = line.startswith('[project.entry-points."')
            text += f"[{line.split(chr(34))[1]}]\n" if group else ""
        elif group and line:
            text += line.replace('"', "") + "\n"
    info = folder / "my_attention-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-attention\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(text)
    return folder


def test_entry_points_need_no_import(tmp_path: Path) -> None:
    code = """
import sys
import dit_accel
from dit_accel import Recipe, presets
from dit_accel.recipe import kinds_of
assert "strided" in list(kinds_of("select")) and "my_attention" not in sys.modules
recipe = presets.resolve("strided_snake").with_fields({"reuse": "alternate"})
assert Recipe.from_dict(recipe.to_dict()) == recipe
assert recipe.to_dict()["select"]["kind"] == "strided"
import my_attention  # registers what the entry points name
assert list(kinds_of("select")).count("strided") == 1
"""
    result = python(code, installed(tmp_path), EXAMPLE)
    assert result.returncode == 0, result.stderr
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for group in (*GROUPS.values(), presets.NAMES.group, "dit_accel.families"):
        assert f"`{group}`" in page


def test_an_entry_point_takes_no_name_of_ours_and_none_of_no_use(tmp_path: Path) -> None:
    folder = installed(
        tmp_path,
        '[project.entry-points."dit_accel.selections"]',
        "mass = my_attention.selection:Strided",
        "odd = json:loads",
    )
    code = """
from dit_accel import Recipe
from dit_accel.recipe import SELECTS
assert type(Recipe().with_fields({"select": "mass"}).select) is SELECTS["mass"]
try:
    Recipe().with_fields({"select": "odd"})
except TypeError as error:
    print(error)
"""
    result = python(code, folder, EXAMPLE)
    assert result.returncode == 0, result.stderr
    assert "The entry point 'mass' of dit_accel.selections is left out: the name is taken." in result.stderr
    assert result.stdout.startswith(
        "The entry point 'odd' of dit_accel.selections is of no use: The select of a recipe"
    )
