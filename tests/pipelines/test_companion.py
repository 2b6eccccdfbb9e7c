"""Trained weights are found where they are installed, else in the checkout, and are missed in one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from dit_accel import load_adapter
from dit_accel.pipelines import companion, load
from dit_accel.pipelines.builtin import builtin_named, builtins
from dit_accel.pipelines.companion import Distribution
from dit_accel.pipelines.embedded_long import load_embedded_long
from tests.cli.test_commands import run

ROOT = Path(__file__).parents[2]


def home(folder: Path, *names: str, of: Distribution = companion.MODELS) -> Path:
    """A package whose models have checksums and nothing else."""
    package = folder / of.package
    for name in names:
        (package / name).mkdir(parents=True)
        (package / name / companion.CHECKSUMS).write_text("{}")
    package.mkdir(exist_ok=True, parents=True)
    (package / "__init__.py").touch()
    return package


@pytest.fixture
def not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companion, "find_spec", lambda name: None)


@pytest.fixture
def nowhere(not_installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(companion, "CHECKOUT", tmp_path / "no-checkout")


@pytest.mark.usefixtures("not_installed")
def test_a_checkout_needs_no_installation() -> None:
    there = ROOT / "models" / "dit_accel_models"
    assert companion.folder_of("embedded") == there / "embedded"
    assert companion.folder_of("embedded-long") == ROOT / "models_long" / "dit_accel_models_long" / "embedded_long"
    assert companion.adapters() == {name: there / "embedded_adapters" / name for name in companion.ADAPTERS}
    assert builtins()["embedded"].adapters == companion.adapters()


@pytest.mark.parametrize("text", ["[]", "1", "null", "{", ""])
def test_damaged_checksums_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / companion.CHECKSUMS).write_text(text)
    with pytest.raises(ValueError, match=r"The model is damaged: .*checksums\.json .* Install dit-accel-models again"):
        companion.check_files(tmp_path)


def test_nor_does_its_folder_on_the_path(tmp_path: Path) -> None:
    script = "from dit_accel.pipelines.companion import folder_of; print(folder_of('embedded'))"
    # -S: without what is installed beside Python.
    command = [sys.executable, "-S", "-c", script]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(ROOT / "models" / "dit_accel_models" / "embedded")


def test_what_is_installed_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = tmp_path / "checkout"
    monkeypatch.setattr(companion, "CHECKOUT", checkout)
    home(checkout / "models", "embedded", "embedded_image")
    long = home(checkout / "models_long", "embedded_long", of=companion.LONG)
    installed = home(tmp_path / "installed", "embedded")
    monkeypatch.delitem(sys.modules, installed.name, raising=False)
    monkeypatch.syspath_prepend(str(installed.parent))
    assert companion.folder_of("embedded") == installed / "embedded"
    assert companion.folder_of("embedded-long") == long / "embedded_long"
    assert companion.folder_of("embedded-image") == checkout / "models" / installed.name / "embedded_image"
    (checkout / "models" / installed.name / "embedded_image" / companion.CHECKSUMS).unlink()
    with pytest.raises(ValueError, match=r"model 'embedded-image' .* does not hold it: models/README\.md") as refused:
        load("embedded-image")
    assert str(installed) in str(refused.value)


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize("name", companion.NAMES)
def test_a_missing_model_is_said_in_one_sentence(name: str) -> None:
    assert list(builtins()) == ["random-wan"]
    brought = {"embedded-long": ("dit-accel-models-long", "./models ./models_long")}
    distribution, folders = brought.get(name, ("dit-accel-models", "./models"))
    sentence = (
        f"The model {name!r} comes with {distribution}, which is not installed: `pip install {folders}` in a checkout "
        "of dit-accel."
    )
    for asked in (load, builtin_named, companion.folder_of):
        with pytest.raises(ValueError) as refused:
            asked(name)
        assert str(refused.value) == sentence


def test_a_missing_autoencoder_is_said_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The long model is there, and what it shares with the small one is not."""
    long = companion.folder_of("embedded-long")
    monkeypatch.setattr(companion, "find_spec", lambda name: None)
    monkeypatch.setattr(companion, "CHECKOUT", tmp_path)
    with pytest.raises(ValueError) as refused:
        load_embedded_long(folder=long)
    assert str(refused.value) == (
        "The autoencoder of 'embedded-long' comes with dit-accel-models, which is not installed: "
        "`pip install ./models` in a checkout of dit-accel."
    )


@pytest.mark.usefixtures("nowhere")
def test_a_missing_adapter_is_said_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"The adapter 'sla-0\.1' comes with .*`pip install \./models`"):
        load_adapter(nn.Identity(), "sla-0.1")
    with pytest.raises(ValueError, match=r"There is no adapter or checkpoint at sla-0\.7"):
        load_adapter(nn.Identity(), "sla-0.7")


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize("model", [[], ["embedded"]])
def test_commands_take_no_random_model_in_its_place(model: list[str], tmp_path: Path) -> None:
    done = run("generate", *model, "--prompt", "a red car", "--out", str(tmp_path / "clip.mp4"))
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: The model 'embedded' comes with dit-accel-models, which is not installed")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nowhere")
def test_info_says_what_is_missing() -> None:
    shown = " ".join(run("info", "--device", "cpu").stdout.split())
    assert "random-wan" in shown
    assert "The model 'embedded' comes with dit-accel-models, which is not installed" in shown


@pytest.mark.usefixtures("nowhere")
def test_a_folder_of_that_name_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "embedded").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="The folder embedded holds no pipeline"):
        load("embedded")
