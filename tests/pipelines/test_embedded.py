"""The built-in model: complete, small, loadable without network or home, and checked against damage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dit_accel
from dit_accel.pipelines.companion import ADAPTERS, CHECKSUMS, adapters, check_files, folder_of
from dit_accel.pipelines.embedded_model import SETTINGS, load_embedded

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "train_embedded"
FOLDER = folder_of("embedded")


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = load_embedded(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, prompt: str, frames: int, guidance: float = 1.0) -> np.ndarray:
    return pipe(
        prompt,
        height=64,
        width=64,
        num_frames=frames,
        num_inference_steps=2,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).frames[0]


def test_size_is_within_the_wheels_budget() -> None:
    folders = (FOLDER, FOLDER.with_name("embedded_adapters"))
    total = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    assert 35e6 < total <= 40e6
    for folder in adapters().values():
        assert sum(file.stat().st_size for file in folder.iterdir()) <= 10e6


def test_every_adapter_has_its_name() -> None:
    there = {card.parent.name for card in FOLDER.with_name("embedded_adapters").glob("*/adapter.json")}
    assert there == set(ADAPTERS) == set(adapters())


def test_configs_name_no_machine_paths() -> None:
    for file in FOLDER.rglob("*.json"):
        assert "_name_or_path" not in file.read_text(), file


def test_every_file_has_a_checksum() -> None:
    listed = set(json.loads((FOLDER / CHECKSUMS).read_text()))
    present = {f.relative_to(FOLDER).as_posix() for f in FOLDER.rglob("*") if f.is_file()} - {CHECKSUMS}
    assert listed == present


def test_default_clip_has_enough_tokens() -> None:
    config = json.loads((FOLDER / "transformer" / "config.json").read_text())
    latent = ((SETTINGS.frames - 1) // 4 + 1, SETTINGS.height // 8, SETTINGS.width // 8)
    tokens = np.prod([n // p for n, p in zip(latent, config["patch_size"])])
    assert tokens >= 4000


def test_loads_offline_and_without_a_home_to_write_to() -> None:
    script = (
        "import socket\n"
        "def refuse(*a, **k): raise RuntimeError('network touched')\n"
        "socket.socket.connect = refuse\n"
        "socket.getaddrinfo = refuse\n"
        "from diffusers import DiffusionPipeline\n"
        "from dit_accel.pipelines.companion import folder_of\n"
        "from dit_accel.pipelines.embedded_model import load_embedded\n"
        "a = load_embedded()\n"
        "b = DiffusionPipeline.from_pretrained(folder_of('embedded'))\n"
        "assert isinstance(a, type(b)) and type(a).__name__ == type(b).__name__ == 'WanPipeline'\n"
        "print(a.transformer.dtype, a.vae.dtype)\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "TRANSFORMERS_"))}
    env |= {"HF_HUB_OFFLINE": "1", "HOME": "/proc/nobody", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["torch.bfloat16", "torch.float32"]


def test_generates_video_and_image(pipe: Any) -> None:
    video = generate(pipe, "a green dragon flying left over the sea at night", 9)
    image = generate(pipe, "a red car in a forest", 1)
    assert video.shape == (9, 64, 64, 3)
    assert image.shape == (1, 64, 64, 3)
    assert np.isfinite(video).all()
    assert np.isfinite(image).all()


def test_adapters_fit_and_all_comes_back(pipe: Any) -> None:
    call = {"height": 96, "width": 96, "num_frames": 13, "num_inference_steps": 2, "guidance_scale": 1.0}

    def latents() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe("a red car in a forest", **call, generator=generator, output_type="latent").frames

    dense = latents()
    for folder in adapters().values():
        with dit_accel.load_adapter(pipe, folder) as handle:
            tuned = latents()
            assert not handle.summary().dense_calls
        with dit_accel.patch(pipe, handle.recipe):
            plain = latents()
        assert tuned.isfinite().all()
        assert not torch.equal(tuned, plain)
        assert torch.equal(latents(), dense)


def test_prompt_changes_the_clip(pipe: Any) -> None:
    night = generate(pipe, "a green dragon flying left over the sea at night", 5)
    day = generate(pipe, "an airplane moving up in a cloudy sky", 5)
    assert night.mean() < day.mean() - 0.05  # the same noise, but night is darker than day


@pytest.mark.parametrize("prompt", ["", "colorless zebras sleep furiously", "ドラゴン !?", "a " * 600])
def test_unknown_words_do_not_crash(pipe: Any, prompt: str) -> None:
    assert np.isfinite(generate(pipe, prompt, 1, guidance=2.0)).all()


def test_unknown_words_become_one_token(pipe: Any) -> None:
    ids = pipe.tokenizer("a Dragon, zebrafish!").input_ids
    assert pipe.tokenizer.convert_ids_to_tokens(ids) == ["a", "dragon", "<unk>", "</s>"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_weights_are_named(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "embedded"
    shutil.copytree(FOLDER, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=r"transformer.diffusion_pytorch_model\.safetensors"):
        load_embedded(folder=folder)


def test_intact_files_pass() -> None:
    check_files(FOLDER)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the training scripts importable; they import each other as scripts do."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.mark.usefixtures("training")
def test_whole_clip_autoencoder_equals_the_stock_one(pipe: Any) -> None:
    from clip_autoencoder import decode_clip, encode_clip

    clip = torch.rand(1, 3, 13, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        stock = pipe.vae.encode(clip).latent_dist.parameters
        ours = encode_clip(pipe.vae, clip)
        latents = stock.chunk(2, dim=1)[0]
        decoded = pipe.vae.decode(latents).sample
        again = decode_clip(pipe.vae, latents).clamp(-1, 1)
    # Another order of fp32 sums through about 30 layers.
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-3 * stock.std().item())
    torch.testing.assert_close(again, decoded, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("training")
def test_training_feeds_the_transformer_what_the_pipeline_does(pipe: Any) -> None:
    from captions import Scene, caption
    from model import CAPTION_TOKENS, encode_words, prompt_embeddings, token_ids

    text = caption(Scene(0, 3, 0, 0))
    assert text == "a green dragon flying left over the sea at night"
    row = encode_words(text, token_ids())
    assert row == pipe.tokenizer(text).input_ids
    ids = torch.tensor([row + [0] * (CAPTION_TOKENS - len(row))])
    with torch.no_grad():
        expected = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=512)[0]
        torch.testing.assert_close(prompt_embeddings(pipe.text_encoder, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("training")
def test_checkpoint_restores_optimizers_exactly(tmp_path: Path) -> None:
    from checkpoint import flatten_state, load_tensors, save_tensors, unflatten_state
    from optimizer import Muon

    torch.manual_seed(0)
    start = torch.randn(8, 4)
    gradients = torch.randn(6, 8, 4)

    def run(parameter: torch.nn.Parameter, optimizer: Muon, rows: torch.Tensor) -> None:
        for gradient in rows:
            parameter.grad = gradient.clone()
            optimizer.step()

    straight = torch.nn.Parameter(start.clone())
    run(straight, Muon([straight], lr=0.1), gradients)

    first = torch.nn.Parameter(start.clone())
    optimizer = Muon([first], lr=0.1)
    run(first, optimizer, gradients[:3])
    tensors, rest = flatten_state(optimizer.state_dict(), "muon")
    save_tensors({"weight": first.detach(), **tensors}, tmp_path, "state")
    saved = load_tensors(tmp_path, "state")
    second = torch.nn.Parameter(saved["weight"])
    resumed = Muon([second], lr=0.1)
    resumed.load_state_dict(unflatten_state(saved, json.loads(json.dumps(rest)), "muon"))
    run(second, resumed, gradients[3:])
    assert torch.equal(straight, second)


@pytest.mark.usefixtures("training")
def test_concentration_penalty_measures_what_block_selection_needs() -> None:
    from concentration import annealed_share, concentration_penalty, density

    narrow, even = torch.zeros(1, 1, 1, 20), torch.full((1, 1, 1, 20), 0.05)
    narrow[..., :2] = 0.48
    narrow[..., 2:] = 0.04 / 18
    assert concentration_penalty(narrow, 0.1).item() == 0
    assert concentration_penalty(even, 0.1).item() == pytest.approx(np.log(0.95 / 0.1), rel=1e-4)
    assert density(narrow).item() == pytest.approx(0.1)
    assert density(even).item() == pytest.approx(0.95, abs=0.051)
    assert [annealed_share(0.4, 0.1, done) for done in (0, 0.3, 0.6, 1)] == pytest.approx([0.4, 0.2, 0.1, 0.1])


@pytest.mark.usefixtures("training")
def test_concentration_reaches_queries_and_keys_of_each_layer() -> None:
    from concentration import attention_inputs, concentration_penalty, tile_masses, tile_tokens
    from model import build_transformer

    torch.manual_seed(0)
    transformer = build_transformer(layers=2, heads=2, head_dim=64)
    latents, text = torch.randn(1, 16, 4, 8, 8), torch.randn(1, 8, 128)
    order = tile_tokens((4, 8, 8), torch.device("cpu"))
    for query, key in attention_inputs(transformer, latents, torch.tensor([500.0]), text):
        concentration_penalty(tile_masses(query, key, order, torch.tensor([0, 3])), 0.25).backward()
    touched = {name for name, p in transformer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name for name in touched if "attn2" in name or "ffn" in name or "to_v" in name} == set()
    assert {f"blocks.{i}.attn1.to_{x}.weight" for i in (0, 1) for x in "qk"} <= touched


@pytest.mark.usefixtures("training")
def test_subjects_move_no_faster_than_the_autoencoder_follows() -> None:
    import random

    from captions import MOTION_NAMES
    from compose import ClipGeometry, _trajectory

    geometry = ClipGeometry()
    time = torch.linspace(0, 1, geometry.frames)
    for seed in range(50):
        for motion in MOTION_NAMES:
            x, y, _ = _trajectory(motion, time, random.Random(seed))
            step = torch.stack([x.diff(), y.diff()]).norm(dim=0).max()
            assert step * geometry.height <= 9.5, motion


@pytest.mark.usefixtures("training")
def test_small_subjects_count_more() -> None:
    from compose import subject_weight

    cover = torch.zeros(2, 1, 1, 20, 20)
    cover[0, ..., :2, :10] = 1  # a twentieth of the clip
    cover[1, ..., :10, :] = 1  # half of it
    weight = subject_weight(cover, 3, 8)
    assert weight.mean().item() == pytest.approx(1)
    small, large, ground = weight[0, 0, 0, 0, 0], weight[1, 0, 0, 0, 0], weight[0, 0, 0, -1, -1]
    assert (small / ground).item() == pytest.approx(9)
    assert (large / ground).item() == pytest.approx(4)
