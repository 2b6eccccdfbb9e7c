"""The scripts that train the built-in models, at a size of seconds: they learn, and resume to the bit."""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from dit_accel.pipelines.embedded_model import FOLDER

EXAMPLES = Path(__file__).parents[2] / "examples" / "train_embedded"
VIDEO = [
    "--patch",
    "2",
    "--heads",
    "1",
    "--head-dim",
    "32",
    "--layers",
    "1",
    "--concentration",
    "0",
    "--image-every",
    "3",
]
IMAGE = ["--task", "image", "--heads", "1", "--layers", "1", "--single-layers", "1"]


@pytest.fixture(autouse=True)
def training(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the training scripts importable; they import each other as scripts do."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(EXAMPLES) in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.fixture(scope="module")
def sprites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain discs as large as a thumbnail, in place of 700 MB of animations."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        from captions import SUBJECTS
        from sprites import SPRITE_FRAMES
    finally:
        sys.path.remove(str(EXAMPLES))
    path = tmp_path_factory.mktemp("sprites") / "sprites.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, subject in enumerate(SUBJECTS):
            strip = Image.new("RGBA", (8 * SPRITE_FRAMES, 8))
            draw = ImageDraw.Draw(strip)
            for frame in range(SPRITE_FRAMES):
                draw.ellipse((8 * frame, 0, 8 * frame + 7, 7), fill=(8 * number, 200, 30, 255))
            stored = io.BytesIO()
            strip.save(stored, "WEBP", lossless=True)
            archive.writestr(f"{subject.name}.webp", stored.getvalue())
    return path


def run(sprites: Path, out: Path, *words: str) -> Any:
    """The trainer after a run of the script's own loop."""
    from train_transformer import build_trainer, read_arguments, train

    common = ["--sprites", str(sprites), "--vae", str(FOLDER / "vae"), "--seconds", "1e9", "--out", str(out)]
    args = read_arguments([*common, *words])
    out.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(args, torch.device("cpu"))
    train(trainer, args, 0.0)
    trainer.save_average(out)
    trainer.save(out / "checkpoint")
    return trainer


STAGES = {
    "video": ["--stages", "1:2:4:3:0.4:32:32x32", "2:2:2:2:0.6:32:32x48"],
    "image": ["--stages", "1:2:4:3:0.4:32:32x32", "1:2:2:2:0.6:32:32x48"],
}


@pytest.mark.parametrize("task", ["video", "image"])
@pytest.mark.parametrize("at", [3, 8], ids=["in-a-stage", "in-the-next"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, sprites: Path, task: str, at: int) -> None:
    plan = [*(VIDEO if task == "video" else IMAGE), *STAGES[task], "--steps", "12"]
    straight = run(sprites, tmp_path / "straight", *plan)
    run(sprites, tmp_path / "pieces", *plan, "--stop-at", str(at))
    resumed = run(sprites, tmp_path / "pieces", *plan, "--resume", str(tmp_path / "pieces" / "checkpoint"))
    assert resumed.planned == straight.planned == 12
    start = build(sprites, *plan).named_values()
    for name, value in straight.named_values().items():
        assert torch.equal(value, resumed.named_values()[name]), name
        assert torch.equal(straight.average[name], resumed.average[name]), name
    moved = [name for name, value in straight.named_values().items() if not torch.equal(value, start[name])]
    assert len(moved) > 0.8 * len(start)
    assert straight.running == resumed.running
    assert [p.stat().st_size <= 2**24 for p in (tmp_path / "pieces" / "checkpoint").iterdir()]


def build(sprites: Path, *words: str) -> Any:
    from train_transformer import build_trainer, read_arguments

    common = ["--sprites", str(sprites), "--vae", str(FOLDER / "vae")]
    return build_trainer(read_arguments([*common, *words]), torch.device("cpu"))
