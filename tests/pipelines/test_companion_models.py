"""The two larger models, made here with random weights: they load by name and run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import dit_accel
from dit_accel.cli.main import app
from dit_accel.pipelines import load
from dit_accel.pipelines.builtin import builtins
from dit_accel.pipelines.companion import HOMES, folder_of
from dit_accel.pipelines.image_autoencoder import ImageAutoencoder

EXAMPLES = Path(__file__).parents[2] / "examples" / "train_embedded"
BUILT = {
    "embedded-long": {"task": "video", "layers": 1, "heads": 1, "head_dim": 64, "patch": 2, "time_shift": 5.0},
    "embedded-image": {"task": "image", "layers": 1, "heads": 1, "single_layers": 1, "time_shift": 3.0},
}


def save_run(folder: Path, built: dict[str, Any]) -> None:
    """What a training leaves, with weights as they are drawn."""
    from image_model import build_image_transformer, build_pooled_encoder
    from model import build_text_encoder, build_transformer

    torch.manual_seed(0)
    if built["task"] == "image":
        transformer = build_image_transformer(built["layers"], built["single_layers"], built["heads"])
        parts = {"transformer": transformer, "pooled_encoder": build_pooled_encoder()}
    else:
        transformer = build_transformer(built["layers"], built["heads"], built["head_dim"], built["patch"])
        parts = {"transformer": transformer}
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)  # a fresh one predicts nothing
    parts["text_encoder"] = build_text_encoder()
    values = {f"{part}.{name}": value for part, net in parts.items() for name, value in net.named_parameters()}
    folder.mkdir()
    save_file({name: value.detach().contiguous() for name, value in values.items()}, folder / "ema-00000.safetensors")
    (folder / "log.json").write_text(json.dumps({"step": 1, "log": [], "built": built}))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Packages with both models, as `export.py` writes them, where Python finds them."""
    root = tmp_path_factory.mktemp("models")
    homes = {name: root / HOMES[name].package for name in BUILT}
    for home in homes.values():
        home.mkdir()
        (home / "__init__.py").touch()
    sys.path.insert(0, str(EXAMPLES))
    try:
        from export import put_together, write

        for name, built in BUILT.items():
            save_run(root / name, built)
            write(put_together(root / name, None), homes[name] / name.replace("-", "_"))
    finally:
        sys.path.remove(str(EXAMPLES))
    sys.path.insert(0, str(root))
    yield root
    sys.path.remove(str(root))
    for home in homes.values():
        sys.modules.pop(home.name, None)


def call(pipe: Any, **more: Any) -> Any:
    plain = {"height": 64, "width": 96, "num_inference_steps": 2, "output_type": "np"}
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt="a red car in a forest", generator=torch.Generator().manual_seed(0), **(plain | more))


def test_both_are_built_in_behind_the_first(package: Path) -> None:
    assert list(builtins()) == ["embedded", "embedded-long", "embedded-image", "random-wan"]
    assert builtins()["embedded-image"].settings.frames is None


def test_long_clips_have_the_tokens_of_real_ones(package: Path) -> None:
    pipe = load("embedded-long", dtype=torch.float32)
    assert pipe.scheduler.config.shift == 5.0
    settings, patch = builtins()["embedded-long"].settings, pipe.transformer.config.patch_size
    latents = ((settings.frames - 1) // 4 + 1, settings.height // 8, settings.width // 8)
    assert np.prod([n // p for n, p in zip(latents, patch)]) == 32760
    frames = call(pipe, num_frames=5, guidance_scale=1.0).frames[0]
    assert frames.shape == (5, 64, 96, 3)
    assert np.isfinite(frames).all()


def test_images_take_the_size_guidance_and_reference_that_are_given(package: Path) -> None:
    pipe = load("embedded-image", dtype=torch.float32)
    seen: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda _m, _a, given: seen.append(given), with_kwargs=True)
    plain = call(pipe, guidance_scale=1.0).images
    assert plain.shape == (1, 64, 96, 3)  # and not a million pixels
    assert len(seen) == 2
    assert seen[0]["hidden_states"].shape == (1, 4 * 6, 64)
    assert seen[0]["encoder_hidden_states"].shape[1] == 64
    guided = call(pipe).images
    assert len(seen) == 2 + 4  # its own guidance, against an empty prompt
    assert not np.allclose(plain, guided)
    reference = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    edited = call(pipe, guidance_scale=1.0, image=reference, _auto_resize=False).images
    assert seen[-1]["hidden_states"].shape == (1, 4 * 6 + 4 * 4, 64)
    assert seen[-1]["img_ids"][:, 0].tolist() == [0.0] * 24 + [1.0] * 16
    assert not np.allclose(plain, edited)
    two = pipe(prompt=["a car", "a cat"], height=64, width=64, num_inference_steps=1, output_type="np").images
    assert two.shape == (2, 64, 64, 3)


def test_the_call_says_what_it_takes_by_itself(package: Path) -> None:
    pipe = load("embedded-image", dtype=torch.float32)
    assert pipe._defaults({}) == {
        "width": 1024, "height": 1024, "num_inference_steps": 20, "guidance_scale": 2.0, "max_sequence_length": 64,
    }  # fmt: skip
    again = type(pipe).of(pipe, builtins()["embedded-image"].settings)
    assert again.transformer is pipe.transformer


def test_training_feeds_the_transformer_what_the_pipeline_does(
    package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Text, positions, reference and timestep of a step of training, against those of the pipeline's first step."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from argparse import Namespace

    from image_task import ImageTask
    from model import CAPTION_TOKENS, encode_words

    pipe = load("embedded-image", dtype=torch.float32)
    assert "Expected types" not in capsys.readouterr().err
    task = ImageTask(Namespace(layers=1, single_layers=1, heads=1), None, torch.device("cpu"))
    task.text_encoder, task.pooled_encoder, task.transformer = pipe.text_encoder_2, pipe.text_encoder, pipe.transformer
    seen: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda _m, _a, given: seen.append(given), with_kwargs=True)
    g = torch.Generator().manual_seed(0)
    noise, reference = torch.randn(1, 16, 1, 8, 12, generator=g), torch.randn(1, 16, 1, 6, 4, generator=g)
    pipe(
        prompt="a red car in a forest", image=reference[:, :, 0], width=96, height=64, num_inference_steps=1,
        guidance_scale=1.0, output_type="latent", latents=pipe._pack_latents(noise, 1, 16, 8, 12),
    )  # fmt: skip
    words = encode_words("a red car in a forest", task.ids)
    rows = torch.tensor([words + [0] * (CAPTION_TOKENS - len(words))])
    with torch.no_grad():
        velocity = task.velocity(noise, torch.ones(1), rows, reference, 64)
        expected = pipe.transformer(**seen[0])[0][:, : 4 * 6]
    theirs, ours = seen[0], seen[1]
    for name in ("hidden_states", "encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids", "timestep"):
        torch.testing.assert_close(ours[name], theirs[name], msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(pipe._pack_latents(velocity, 1, 16, 8, 12), expected)


def test_image_latents_are_those_of_the_training() -> None:
    """Against Wan's own autoencoder and its statistics, of one frame."""
    import diffusers

    stock = diffusers.AutoencoderKLWan.from_pretrained(folder_of("embedded") / "vae")
    ours = ImageAutoencoder.of(folder_of("embedded") / "vae")
    image = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = ours.encode(image).latent_dist
        of_stock = stock.encode(image[:, :, None]).latent_dist
        mean, std = (
            torch.tensor(v).double().view(1, -1, 1, 1) for v in (stock.config.latents_mean, stock.config.latents_std)
        )
        torch.testing.assert_close(posterior.mode().double(), (of_stock.mode()[:, :, 0].double() - mean) / std)
        torch.testing.assert_close(posterior.std.double(), of_stock.std[:, :, 0].double() / std)
        torch.testing.assert_close(ours.decode(posterior.mode()).sample, stock.decode(of_stock.mode()).sample[:, :, 0])
        assert ours.encode(image.bfloat16()).latent_dist.mode().dtype == torch.bfloat16
        assert ours.decode(posterior.mode().bfloat16(), return_dict=False)[0].dtype == torch.bfloat16
    assert 2 ** (len(ours.config.block_out_channels) - 1) == 8


@pytest.mark.parametrize("name", list(BUILT))
def test_recipes_run_sparse_on_them(package: Path, name: str) -> None:
    pipe = load(name, dtype=torch.float32)
    more = {"guidance_scale": 1.0, "output_type": "latent"} | ({"num_frames": 5} if name == "embedded-long" else {})
    more |= {"height": 256, "width": 256}
    dense = call(pipe, **more)
    with dit_accel.patch(pipe, "pooled", density=0.3, dense_fraction=0.0) as handle:
        sparse = call(pipe, **more)
        assert handle.summary().sparse_calls
    assert not torch.equal(*(found.frames if name == "embedded-long" else found.images for found in (dense, sparse)))


@pytest.mark.parametrize("name", list(BUILT))
def test_a_damaged_model_names_what_brings_it(package: Path, name: str) -> None:
    home = HOMES[name]
    file = package / home.package / name.replace("-", "_") / "scheduler" / "scheduler_config.json"
    whole = file.read_text()
    file.write_text(whole + " ")
    try:
        with pytest.raises(ValueError, match=rf"scheduler_config\.json.*Install {home.name} again"):
            load(name)
    finally:
        file.write_text(whole)


def test_commands_make_images_of_it(package: Path, tmp_path: Path) -> None:
    size = ["--size", "64x64", "--steps", "2", "--dtype", "fp32"]
    out = tmp_path / "car.png"
    done = CliRunner().invoke(app, ["generate", "embedded-image", "--prompt", "a red car", *size, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert out.is_file()
    edit = tmp_path / "edit.png"
    done = CliRunner().invoke(
        app, ["generate", "embedded-image", "--prompt", "a blue car", *size, "--image", str(out), "--out", str(edit)]
    )
    assert done.exit_code == 0, done.output
    assert edit.read_bytes() != out.read_bytes()
    wrong = CliRunner().invoke(app, ["generate", "embedded-image", "--prompt", "a", "--out", str(tmp_path / "a.mp4")])
    assert wrong.exit_code == 2
    assert "image" in wrong.output
