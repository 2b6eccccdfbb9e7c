"""Loading, generating with and saving pipelines, all without a hub."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from dit_accel.pipelines import load
from dit_accel.pipelines.builtin import RANDOM_WAN, builtins
from dit_accel.pipelines.generate import Generated, generate, makes_video, output_path, save
from tests.tiny import TINY

SMALL = {"width": 64, "height": 32, "frames": 5, "steps": 2, "guidance": 3.0}


@pytest.fixture(scope="module")
def pipe() -> object:
    return load("random-wan")


def test_random_wan_says_it_is_random() -> None:
    assert "RANDOM" in builtins()["random-wan"].description


def test_random_wan_default_size_is_long_enough_to_gain(pipe: object) -> None:
    settings = RANDOM_WAN.settings
    tokens = ((settings.frames - 1) // 4 + 1) * (settings.height // 8) * (settings.width // 8)
    assert tokens >= 4000
    assert tuple(pipe.transformer.config.patch_size) == (1, 1, 1)


def test_prompt_goes_in(pipe: object) -> None:
    a, b = (generate(pipe, prompt, **SMALL).frames.astype(int) for prompt in ("a cat", "two dogs"))
    assert a.shape == (5, 32, 64, 3)
    assert np.abs(a - b).max() > 0


def test_same_seed_same_frames_and_other_seed_other_frames(pipe: object) -> None:
    first, again, other = (generate(pipe, "a cat", seed=seed, **SMALL).frames for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_building_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    load("random-wan")
    assert torch.equal(before, torch.get_rng_state())


def test_dtype_spares_what_must_stay_float32() -> None:
    pipe = load("random-wan", dtype=torch.bfloat16)
    assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert pipe.transformer.blocks[0].scale_shift_table.dtype == torch.float32
    assert pipe.vae.dtype == torch.float32
    assert generate(pipe, "a cat", **SMALL).nan_values == 0


def test_saved_folder_loads_again(pipe: object, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    again = load(str(tmp_path))
    assert np.array_equal(generate(pipe, "a cat", **SMALL).frames, generate(again, "a cat", **SMALL).frames)


def test_progress_counts_steps(pipe: object) -> None:
    seen: list[tuple[int, int]] = []
    generate(pipe, "a cat", **SMALL, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-such-model", "neither a built-in model"),
        ("nobody/nothing", "could not be loaded"),
        ("{empty}", "model_index.json"),
    ],
)
def test_unknown_models_are_refused(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        load(name.format(empty=tmp_path))


def test_a_setting_that_the_pipeline_lacks_is_refused() -> None:
    pipe = TINY["flux"].build()
    with pytest.raises(ValueError, match="FluxPipeline takes no num_frames, got 9"):
        generate(pipe, "a cat", frames=9)


def test_nan_is_counted_not_hidden(pipe: object, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = pipe.vae.decode

    def broken(*args: object, **kwargs: object) -> tuple[torch.Tensor]:
        (video,) = decode(*args, **kwargs)
        video[..., 0, 0] = float("nan")
        return (video,)

    monkeypatch.setattr(pipe.vae, "decode", broken)
    assert generate(pipe, "a cat", **SMALL).nan_values == 5 * 3


def clip(frames: int, height: int, width: int, is_video: bool) -> Generated:
    ramp = np.linspace(40, 200, width)[None, None, :, None]
    pixels = np.broadcast_to(ramp, (frames, height, width, 3)).astype(np.uint8)
    return Generated(pixels, 1.0, 16.0, is_video, 0)


@pytest.mark.parametrize(("height", "width"), [(32, 64), (33, 65)])
def test_video_is_saved_as_h264_with_even_sides(height: int, width: int, tmp_path: Path) -> None:
    path = save(clip(7, height, width, True), tmp_path / "deep" / "film")
    assert path == tmp_path / "deep" / "film.mp4"
    frames = iio.imread(path, plugin="FFMPEG")
    assert frames.shape == (7, height + height % 2, width + width % 2, 3)
    assert np.abs(frames[:, :height, :width].astype(int) - clip(7, height, width, True).frames).mean() < 4
    meta = iio.immeta(path, plugin="FFMPEG")
    assert (meta["codec"], meta["fps"]) == ("h264", 16.0)
    assert meta["pix_fmt"].startswith("yuv420p")


def test_image_is_saved_exactly(tmp_path: Path) -> None:
    image = clip(1, 33, 65, False)
    path = save(image, tmp_path / "picture.png")
    assert np.array_equal(iio.imread(path), image.frames[0])


@pytest.mark.parametrize(("name", "kind"), [("one.png", "png"), ("one.webp", "webp"), ("one", "mp4")])
def test_one_frame_of_a_video_may_be_a_picture(name: str, kind: str, tmp_path: Path) -> None:
    film = clip(1, 16, 32, True)
    path = save(film, tmp_path / name)
    assert path.suffix == f".{kind}"
    if kind == "png":
        assert np.array_equal(iio.imread(path), film.frames[0])


def test_a_wrong_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"saved as \.mp4 or \.gif or \.webp; got film\.png"):
        save(clip(2, 8, 8, True), tmp_path / "film.png")


def test_a_dot_in_a_name_is_no_suffix() -> None:
    path = output_path(Path("outputs/Wan-AI--Wan2.1-T2V-1.3B-0"), True)
    assert path == Path("outputs/Wan-AI--Wan2.1-T2V-1.3B-0.mp4")


@pytest.mark.parametrize("name", TINY)
def test_kind_of_output_is_known_before_running(name: str) -> None:
    assert makes_video(TINY[name].build()) == (TINY[name].output == "frames")
