"""8-bit pixels made on the device are, to the level, those that numpy makes of diffusers' float32 frames."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image

from dit_accel.pipelines import load
from dit_accel.pipelines.pixels import Pixels, gives_device_tensors, make_pixels, pixels_of
from dit_accel.quality.generation import checked_clip
from tests.tiny import TINY

VIDEOS = ("wan", "wan-vace", "hunyuan", "cogvideox", "ltx")


def levels_of(values: np.ndarray) -> np.ndarray:
    """In numpy: values that are not finite are black, all others within [0, 1], rounded with halves to even."""
    return (np.where(np.isfinite(values), values, np.float32(0)).clip(0, 1) * np.float32(255)).round().astype(np.uint8)


def arguments_of(family: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return TINY[family].call(generator) | {"num_inference_steps": 1, "generator": generator}


def asked_of(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The output types with which the pipeline's class is called from now on."""
    asked: list[str] = []
    call = type(pipe).__call__

    def noted(self: Any, *args: Any, **options: Any) -> Any:
        asked.append(options["output_type"])
        return call(self, *args, **options)

    monkeypatch.setattr(type(pipe), "__call__", noted)
    return asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", VIDEOS)
def test_a_clip_is_the_same_to_the_level(family, dtype, monkeypatch):
    pipe = TINY[family].build()
    pipe.set_progress_bar_config(disable=True)
    decode = pipe.vae.decode

    def rounded(*args: Any, **options: Any) -> Any:
        found = decode(*args, **options)
        if isinstance(found, tuple):
            return (found[0].to(dtype),)
        found.sample = found.sample.to(dtype)
        return found

    monkeypatch.setattr(pipe.vae, "decode", rounded)
    expected = levels_of(pipe(**arguments_of(family), output_type="np").frames[0])
    asked = asked_of(pipe, monkeypatch)
    made = make_pixels(pipe, arguments_of(family))
    assert asked == ["pt"]
    assert made.is_video
    assert made.nan_values == 0
    assert made.levels.dtype == torch.uint8
    assert made.levels.is_contiguous()
    assert np.array_equal(made.levels.numpy(), expected)
    assert 0 <= made.low < made.high <= 1


def test_an_image_comes_as_diffusers_gives_it(monkeypatch):
    pipe = TINY["flux"].build()
    pipe.set_progress_bar_config(disable=True)
    expected = levels_of(pipe(**arguments_of("flux"), output_type="np").images[:1])
    asked = asked_of(pipe, monkeypatch)
    made = make_pixels(pipe, arguments_of("flux"))
    assert asked == ["np"]
    assert not made.is_video
    assert np.array_equal(made.levels.numpy(), expected)


@pytest.mark.parametrize("channels_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_number_is_rounded_as_in_numpy(dtype, channels_first):
    """All that lies at, or next to, the middle between two levels, NaN, infinities and what is beyond [0, 1]."""
    halves = (torch.arange(255, dtype=torch.float64) + 0.5) / 255
    near = torch.cat([halves.float().nextafter(torch.tensor(end)) for end in (0.0, 1.0)])
    odd = torch.tensor([math.nan, math.inf, -math.inf, -0.25, 1.5, -0.0, 1e-30])
    values = torch.cat([halves.float(), near, odd])
    values = torch.cat([values, torch.zeros(-len(values) % 36)]).reshape(-1, 2, 6, 3).to(dtype)
    given = values.movedim(-1, -3).contiguous() if channels_first else values
    got = pixels_of(SimpleNamespace(frames=given[None]), channels_first)
    assert np.array_equal(got.levels.numpy(), levels_of(values.float().numpy()))
    assert got.nan_values == 3
    assert (got.low, got.high) == (-0.25, 1.5)


def test_several_frames_at_once_and_the_last_few(monkeypatch):
    values = torch.rand(11, 3, 4, 5)
    expected = levels_of(values.movedim(1, -1).numpy())
    split = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda tensor, _: split(tensor, 4))
    assert np.array_equal(pixels_of(SimpleNamespace(frames=values[None]), True).levels.numpy(), expected)


def test_levels_stay_levels_and_nothing_is_refused():
    levels = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    assert torch.equal(pixels_of(SimpleNamespace(frames=levels[None])).levels, levels)
    with pytest.raises(ValueError, match="SimpleNamespace has neither frames nor images"):
        pixels_of(SimpleNamespace(sample=levels))


@pytest.mark.parametrize("field", ["frames", "images"])
@pytest.mark.parametrize("form", ["tensors", "arrays", "pictures", "backwards", "learns"])
def test_what_pipelines_of_others_return(form, field):
    """Lists of frames, pictures where none were asked for, arrays that run backwards, and what has a gradient."""
    values = torch.rand(3, 4, 5, 3, generator=torch.Generator().manual_seed(0))
    expected = levels_of(values.numpy())
    given: Any = {
        "tensors": list(values),
        "arrays": list(values.numpy()),
        "pictures": [Image.fromarray(frame) for frame in expected],
        "backwards": values.flip(0).numpy()[::-1],
        "learns": values.requires_grad_(),
    }[form]
    output = SimpleNamespace(frames=[given]) if field == "frames" else SimpleNamespace(images=given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = pixels_of(output)
    assert np.array_equal(made.levels.numpy(), expected if field == "frames" else expected[:1])
    assert made.is_video is (field == "frames")


def test_no_frames_are_refused_where_a_clip_is_checked():
    made = pixels_of(SimpleNamespace(frames=torch.zeros(1, 0, 4, 5, 3)))
    with pytest.raises(ValueError, match=r"no empty side, got \[0, 4, 5, 3\]"):
        checked_clip(made)


class Outside(type(TINY["wan"].build())):
    """A pipeline of another package."""


class Other(VideoProcessor):
    """A processor whose frames are its own."""

    def postprocess(self, image: torch.Tensor, *args: Any, **options: Any) -> Any:
        return super().postprocess(image.flip(-1), *args, **options)


def test_who_is_asked_for_tensors():
    pipe = TINY["wan"].build()
    assert gives_device_tensors(pipe)
    assert not gives_device_tensors(Outside(**pipe.components))
    assert not gives_device_tensors(TINY["flux"].build())
    assert not gives_device_tensors(lambda **_: None)
    # Ours, which add a call's defaults and no more; and what others make of them.
    ours = load("random-wan")
    assert type(ours).__module__.startswith("dit_accel.")
    assert gives_device_tensors(ours)
    other = type("Other", (type(ours),), {"__module__": "elsewhere"})
    assert not gives_device_tensors(other(**ours.components))
    pipe.video_processor = Other(vae_scale_factor=8)
    assert not gives_device_tensors(pipe)
    pipe = TINY["wan"].build()
    pipe.hdr_video_processor = Other(vae_scale_factor=8)
    assert not gives_device_tensors(pipe)
    # Its "pt" is what the autoencoder gives, in [-1, 1].
    from diffusers import LTXI2VLongMultiPromptPipeline

    assert not gives_device_tensors(LTXI2VLongMultiPromptPipeline.__new__(LTXI2VLongMultiPromptPipeline))


def test_what_is_done_with_the_frames_is_no_decoding(monkeypatch):
    """A stage of a run ends with the run, not after what the host then does."""
    from dit_accel.quality import generation

    pipe, passed = load("random-wan"), [0.0]
    clock = generation.time.perf_counter
    monkeypatch.setattr("time.perf_counter", lambda: clock() + passed[0])

    def slow(made: Pixels) -> torch.Tensor:
        passed[0] += 1000.0
        return made.levels

    monkeypatch.setattr(generation, "checked_clip", slow)
    latent = torch.Tensor.detach

    def slow_too(tensor: torch.Tensor) -> torch.Tensor:
        passed[0] += 1000.0 if tensor.ndim == 5 and tensor.shape[1] == 16 else 0.0
        return latent(tensor)

    monkeypatch.setattr(torch.Tensor, "detach", slow_too)
    call = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
    made = generation.generate_clip(pipe, "a cat", 0, call)
    assert passed[0] >= 2000
    assert made.seconds < 1000
    assert made.stages is not None
    assert made.stages.text + made.stages.steps + made.stages.decode == pytest.approx(made.seconds)
    assert made.frames.dtype == torch.uint8
