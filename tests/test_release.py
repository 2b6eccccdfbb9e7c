"""What a release is made of says one version, and names what it needs."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import dit_accel
from dit_accel.pipelines import companion

if find_spec("tomllib") is None:
    import tomli as tomllib
else:
    import tomllib

ROOT = Path(__file__).parent.parent


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


PROJECT = tomllib.loads(_text("pyproject.toml"))["project"]
MODELS = tomllib.loads(_text("models/pyproject.toml"))
LONG = tomllib.loads(_text("models_long/pyproject.toml"))


def test_one_version_everywhere() -> None:
    comfyui = tomllib.loads(_text("integrations/comfyui/pyproject.toml"))["project"]["version"]
    models, long = MODELS["project"], LONG["project"]
    (cited,) = re.findall(r"^version: (\S+)$", _text("CITATION.cff"), re.MULTILINE)
    assert PROJECT["version"] == dit_accel.__version__ == comfyui == models["version"] == long["version"] == cited
    assert PROJECT["optional-dependencies"]["models"] == [f"dit-accel-models=={PROJECT['version']}"]
    assert PROJECT["optional-dependencies"]["long"] == [f"dit-accel-models-long=={PROJECT['version']}"]
    assert long["dependencies"] == PROJECT["optional-dependencies"]["models"]
    for package in ("models/dit_accel_models", "models_long/dit_accel_models_long"):
        assert f'__version__ = "{PROJECT["version"]}"' in _text(f"{package}/__init__.py")


def test_the_changelog_has_the_version_and_its_date() -> None:
    headings = re.findall(r"^## (.+)$", _text("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    version, date = headings[1].split(" - ")
    assert version == PROJECT["version"]
    assert f'date-released: "{date}"' in _text("CITATION.cff")
    kinds = set(re.findall(r"^### (.+)$", _text("CHANGELOG.md"), re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_core_dependencies_are_what_patch_needs() -> None:
    names = {re.match(r"[\w-]+", one)[0] for one in PROJECT["dependencies"]}  # type: ignore[index]
    assert names == {"torch", "diffusers", "numpy", "safetensors", "triton"}
    (triton,) = (one for one in PROJECT["dependencies"] if one.startswith("triton"))
    assert "platform_system == 'Linux'" in triton
    assert {"cli", "quality", "train", "compile", "ui", "fa4"} <= set(PROJECT["optional-dependencies"])


def test_weights_are_apart() -> None:
    """The wheel is code alone; the others hold all that lies beside it, and it asks for neither unasked."""
    files = [path for path in (ROOT / "dit_accel").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in files} == {".py", ".json", ".typed"}
    assert sum(path.stat().st_size for path in files) < 10e6
    data = MODELS["tool"]["setuptools"]["package-data"]["dit_accel_models"]
    there = {path.name for path in (ROOT / "models" / "dit_accel_models").glob("embedded*")}
    assert {"embedded", "embedded_adapters"} <= there <= {pattern.removesuffix("/**/*") for pattern in data}
    assert LONG["tool"]["setuptools"]["package-data"] == {"dit_accel_models_long": ["embedded_long/**/*"]}
    there = {path.name for path in (ROOT / "models_long" / "dit_accel_models_long").iterdir() if path.is_dir()}
    assert there - {"__pycache__"} == {"embedded_long"}
    extras = PROJECT["optional-dependencies"]
    asking = [name for name, asked in extras.items() if any("dit-accel-models" in one for one in asked)]
    assert asking == ["models", "long"]


@pytest.mark.parametrize(("folder", "project"), [("models", MODELS), ("models_long", LONG)])
def test_all_are_of_one_kind(folder: str, project: dict[str, Any]) -> None:
    models = project["project"]
    assert {name: models[name] for name in ("license", "license-files", "requires-python")} == {
        name: PROJECT[name] for name in ("license", "license-files", "requires-python")
    }
    assert _text(f"{folder}/LICENSE") == _text("LICENSE")
    assert "](" not in _text(f"{folder}/README.md"), "an index of packages knows no path of the checkout"


@pytest.mark.parametrize("page", ["README.md", "docs/install.md", "models/README.md"])
def test_the_command_installs_both(page: str) -> None:
    """Nothing of either is on an index yet, so that neither may ask for the other there."""
    assert re.search(r'^pip install \./models "\.\[cli\]"', _text(page), re.MULTILINE)
    assert MODELS["project"]["dependencies"] == []
    asked = (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cli"])
    assert not any("dit-accel-models" in one for one in asked)


def test_the_long_model_is_installed_with_what_it_needs() -> None:
    """Its distribution asks for the other, which is on no index: pip is given both folders."""
    for page in ("docs/install.md", "models_long/README.md"):
        assert re.search(r'^pip install \./models \./models_long "\.\[cli\]"', _text(page), re.MULTILINE)
    assert companion.LONG.install == "./models ./models_long"
    for one in companion.HOMES.values():
        assert (ROOT / one.folder / one.package / "__init__.py").is_file()


@pytest.mark.parametrize(
    ("system", "machine", "wanted"),
    [
        ("Linux", "x86_64", True),
        ("Linux", "aarch64", True),
        ("Linux", "ppc64le", False),
        ("Darwin", "arm64", False),
        ("Windows", "AMD64", False),
    ],
)
def test_triton_is_asked_for_where_there_is_one(system: str, machine: str, wanted: bool) -> None:
    """And flash-attn-4 on Linux alone: elsewhere all that is asked for can be had."""
    here = {"platform_system": system, "platform_machine": machine, "extra": ""}
    asked = [one for extra in PROJECT["optional-dependencies"].values() for one in extra]
    found = [Requirement(one) for one in (*PROJECT["dependencies"], *asked)]
    names = {one.name for one in found if one.marker is None or one.marker.evaluate(here)}
    assert ("triton" in names) == wanted
    assert ("flash-attn-4" in names) == (system == "Linux")
    assert {"torch", "diffusers", "gradio"} <= names


@pytest.mark.parametrize(
    "page", ["README.md", "docs/install.md", "docs/whole_runs.md", "docs/tune.md", "docs/ui.md", "Dockerfile"]
)
def test_extras_that_are_named_exist(page: str) -> None:
    text = _text(page)
    named = {one for found in re.findall(r"(?:dit-accel|\.|\{wheel\})\[([\w,]+)\]", text) for one in found.split(",")}
    assert named <= set(PROJECT["optional-dependencies"])
    if page == "docs/install.md":
        table = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
        assert table == set(PROJECT["optional-dependencies"]) - {"dev", "docs"}


def test_each_python_is_named() -> None:
    lowest = int(PROJECT["requires-python"].rpartition(".")[2])
    for minor in range(lowest, 14):
        assert f"Programming Language :: Python :: 3.{minor}" in PROJECT["classifiers"]


def test_the_image_copies_what_may_be_copied() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", _text("Dockerfile"), re.MULTILINE)
    allowed = {line.removeprefix("!") for line in _text(".dockerignore").splitlines() if line.startswith("!")}
    assert set(copied[0].split()) == allowed
