"""The scripts that train the built-in models, at a size of seconds: they learn, and resume to the bit."""

from __future__ import annotations

import io
import json
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from dit_accel.pipelines.companion import CHECKSUMS, folder_of

AUTOENCODER = str(folder_of("embedded") / "vae")
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

    common = ["--sprites", str(sprites), "--vae", AUTOENCODER, "--seconds", "1e9", "--out", str(out)]
    args = read_arguments([*common, *words])
    out.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(args, torch.device("cpu"))
    train(trainer, args, 0.0)
    trainer.save_average(out)
    trainer.save(out / "checkpoint")
    return trainer


STAGES = {
    "video": ["--stages", "1:2:4:2:0.6:32:32x32", "2:2:2:1:0.4:32:32x48"],
    "image": ["--stages", "1:2:4:2:0.6:32:32x32", "1:2:2:1:0.4:32:32x48"],
}


# Inside a stage, and in the one after it; the pool was renewed before both.
@pytest.mark.parametrize(("task", "at"), [("video", 3), ("image", 5)])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, sprites: Path, task: str, at: int) -> None:
    plan = [*(VIDEO if task == "video" else IMAGE), *STAGES[task], "--steps", "7"]
    straight = run(sprites, tmp_path / "straight", *plan)
    run(sprites, tmp_path / "pieces", *plan, "--stop-at", str(at))
    resumed = run(sprites, tmp_path / "pieces", *plan, "--resume", str(tmp_path / "pieces" / "checkpoint"))
    assert resumed.planned == straight.planned == 7
    start = build(sprites, *plan).named_values()
    for name, value in straight.named_values().items():
        assert torch.equal(value, resumed.named_values()[name]), name
        assert torch.equal(straight.average[name], resumed.average[name]), name
    moved = [name for name, value in straight.named_values().items() if not torch.equal(value, start[name])]
    assert len(moved) > 0.8 * len(start)
    assert straight.running == resumed.running
    assert all(file.stat().st_size <= 2**24 for file in (tmp_path / "pieces").rglob("*") if file.is_file())


def build(sprites: Path, *words: str) -> Any:
    from train_transformer import build_trainer, read_arguments

    common = ["--sprites", str(sprites), "--vae", AUTOENCODER]
    return build_trainer(read_arguments([*common, *words]), torch.device("cpu"))


def test_a_pool_is_made_again_as_it_was(sprites: Path) -> None:
    from stages import Stage

    trainer = build(sprites, *VIDEO)
    stage = Stage(1, 2, 6, 1, 1.0, 32, (32, 32))
    pool = trainer.pool(stage, 0, 2)
    assert pool.made == 3
    first = pool.latents.clone()
    pool.renew()
    assert torch.equal(pool.latents[2:], first[2:])
    assert not torch.equal(pool.latents[:2], first[:2])
    trainer.made[0] = pool.made
    again = trainer.pool(stage, 0, 2)
    assert torch.equal(again.latents, pool.latents)
    assert again.scenes == pool.scenes
    assert not torch.equal(trainer.pool(stage, 1, 2).latents[:2], pool.latents[:2])  # another stage, other clips


def test_a_few_clips_are_learnt(sprites: Path, tmp_path: Path) -> None:
    plan = [
        *VIDEO,
        "--head-dim",
        "128",
        "--layers",
        "2",
        "--image-every",
        "0",
        "--stages",
        "1:4:4:1000:1:16:32x32",
        "--rate",
        "3e-3",
        "--muon-rate",
        "6e-3",
    ]
    trainer = run(sprites, tmp_path, *plan, "--steps", "75")
    losses = [loss for _, _, loss in trainer.log]
    assert len(losses) == 3
    assert losses[-1] < 0.75 * losses[0]


def test_an_edit_changes_what_it_names_and_nothing_else(sprites: Path) -> None:
    import random

    from captions import Scene
    from image_task import edited, render_edits
    from sprites import SpriteBank, load_sprites
    from stages import Stage

    rng, textures = random.Random(0), torch.Generator().manual_seed(0)
    bank = SpriteBank(load_sprites(sprites), torch.device("cpu"))
    scenes = [Scene(0, 3, 2, 8), Scene(14, None, 3, 8)]
    for edit in ("subject", "place"):
        others = [edited(scene, edit, rng) for scene in scenes]
        for scene, other in zip(scenes, others):
            assert (scene.background == other.background) == (edit == "subject")
            assert ((scene.subject, scene.color) == (other.subject, other.color)) == (edit == "place")
            assert (scene.motion, scene.count, scene.size) == (other.motion, other.count, other.size)
        stage = Stage(1, 1, 1, 1, 1.0, 16, (48, 64))
        after, cover, before = render_edits(scenes, others, bank, stage, 48, rng, textures)
        assert after.shape == before.shape == (2, 3, 1, 48, 64)
        same = (after - before).abs().amax(1, keepdim=True) < 1e-6
        outside, inside = same[cover == 0].float().mean(), same[cover > 0.999].float().mean()
        assert (outside == 1) == (edit == "subject")
        assert (inside > 0.95) == (edit == "place")


def test_a_larger_patch_predicts_what_the_smaller_did(sprites: Path) -> None:
    """On latents that are alike within a patch, where a mean loses nothing: embedding and output, not attention."""
    from model import build_transformer
    from warm_start import fitted_all

    torch.manual_seed(0)
    one, two = build_transformer(1, 1, 32, patch=1), build_transformer(1, 1, 32, patch=2)
    torch.nn.init.normal_(one.proj_out.weight)
    own = {f"transformer.{name}": value for name, value in two.named_parameters()}
    values = {f"transformer.{name}": value.detach() for name, value in one.named_parameters()}
    kept = fitted_all(values, own, fresh_attention=True)
    changed = {name for name in own if not torch.equal(kept[name], own[name])}
    assert not any(".attn1.to_q" in name or ".attn1.norm_k" in name for name in changed)
    assert any(".attn1.to_v" in name for name in changed)
    start = fitted_all(values, own, fresh_attention=False)
    two.load_state_dict({name.removeprefix("transformer."): value for name, value in start.items()}, strict=False)
    latents, text = torch.randn(1, 16, 2, 3, 4), torch.randn(1, 4, 128)
    large = latents.repeat_interleave(2, 3).repeat_interleave(2, 4)
    with torch.no_grad():
        small_out = one(latents, torch.tensor([300.0]), text, return_dict=False)[0]
        large_out = two(large, torch.tensor([300.0]), text, return_dict=False)[0]
    torch.testing.assert_close(large_out, small_out.repeat_interleave(2, 3).repeat_interleave(2, 4))
    with pytest.raises(ValueError, match=r"ffn.*widths must be the same"):
        fitted_all(values, own | {"transformer.blocks.0.ffn.net.2.bias": torch.zeros(7)}, False)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("21:4:8:1:1", "a stage is"),
        ("21:4:8:1:1:64:100x100", "multiples of 16"),
        ("1:1:1:1:1:64:64x64x64", "a size is"),
    ],
)
def test_a_wrong_stage_is_refused(text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    from train_transformer import read_arguments

    with pytest.raises(SystemExit):
        read_arguments(["--stages", text])
    assert said in capsys.readouterr().err


def test_training_goes_on_from_the_released_long_model(sprites: Path, tmp_path: Path) -> None:
    """Weights and averages are those of the folder, and what is exported without a step is the folder again."""
    from export import put_together, write

    folder = folder_of("embedded-long")
    words = (
        "--patch", "2", "--heads", "2", "--head-dim", "128", "--time-shift", "5", "--concentration", "0",
        "--warm-start", str(folder),
    )  # fmt: skip
    trainer = build(sprites, *words)
    trainer.save_average(tmp_path / "run")
    write(put_together(tmp_path / "run", None), tmp_path / "again")
    digests = [json.loads((place / CHECKSUMS).read_text()) for place in (folder, tmp_path / "again")]
    weights = [{name: one[name] for name in one if name.endswith(".safetensors")} for one in digests]
    assert len(weights[0]) == 2
    assert weights[0] == weights[1]
    assert set(digests[0]) == set(digests[1])


def test_stages_end_on_whole_steps() -> None:
    from stages import ends, parse_stage

    stages = [parse_stage(f"1:1:1:1:{share}:64") for share in (1, 1, 1)]
    assert ends(stages, 100) == [0.33, 0.67, 1.0]
    assert parse_stage("21:1:64:1:1:64:480x832").geometry(29, 192).latent_shape == (21, 60, 104)
    assert parse_stage("21:1:64:1:1:64:480x832").chunk(64, 192) == 2


def test_long_clips_and_images_are_judged_in_small(sprites: Path) -> None:
    """A clip shown whole and a smaller one of the same scenes have the shape that one classifier takes."""
    from evaluate import shrink, small_geometry

    for frames, size in ((81, (480, 832)), (29, (192, 192)), (1, (1024, 1024))):
        small = small_geometry(frames, size)
        assert min(small.height, small.width) >= 64
        rendered = torch.zeros(1, 3, small.frames, 8, 8)
        assert shrink(torch.zeros(1, 3, frames, 8, 8)).shape == shrink(rendered).shape
    assert small_geometry(29, (192, 192)).frames == 29


def test_an_adapter_is_judged_in_the_steps_that_it_was_distilled_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evaluate
    import numpy as np

    from dit_accel.pipelines.companion import adapters

    few = tmp_path / "few"
    shutil.copytree(adapters()["sla-0.1"], few)
    card = json.loads((few / "adapter.json").read_text())
    (few / "adapter.json").write_text(
        json.dumps({**card, "steps": {"sigmas": [1.0, 0.75], "renoise": True}}) + "\n",
    )
    asked: list[tuple[int, float]] = []
    real = evaluate.generate

    def counted(pipeline: Any, prompts: Any, steps: int, guidance: float, *more: Any) -> Any:
        asked.append((steps, guidance))
        return real(pipeline, prompts, steps, guidance, *more)

    monkeypatch.setattr(evaluate, "generate", counted)
    small = ["--steps", "3", "--guidance", "2", "--count", "1", "--size", "48x48", "--frames", "5"]
    clips = {}
    for name, more in (("few", [few]), ("sparse", [adapters()["sla-0.1"]]), ("dense", [])):
        file = tmp_path / f"{name}.npz"
        given = ["--adapter", str(more[0])] if more else []
        model = ["--pipeline", str(folder_of("embedded")), "--clips", str(file)]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "generate", *model, *small, *given])
        evaluate.main()
        clips[name] = np.load(file)["clips"]
    assert asked == [(2, 1.0), (3, 2.0), (3, 2.0)]
    assert not np.array_equal(clips["sparse"], clips["dense"])
    assert not np.array_equal(clips["sparse"], clips["few"])
