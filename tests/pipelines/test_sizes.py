"""Sizes and frames are known before a pipeline runs, and are those that it then makes."""

from __future__ import annotations

import pytest
import torch

from dit_accel.pipelines.generate import makes_video
from dit_accel.pipelines.random_wan import build_random_wan
from dit_accel.pipelines.sizes import fitted_frames, refuse_size
from tests.tiny import TINY

VIDEOS = [name for name, tiny in TINY.items() if tiny.output == "frames"]


@pytest.mark.parametrize("name", TINY)
def test_a_size_that_the_pipeline_makes_passes_and_its_neighbours_do_not(name: str) -> None:
    pipe = TINY[name].build()
    call = TINY[name].call(torch.Generator())
    refuse_size(pipe, call["width"], call["height"])
    refuse_size(pipe, None, None)
    if name == "sd3":
        return  # of one pixel a token: any size will do
    for word, change in (("width", 1), ("height", -1)):
        size = {"width": call["width"], "height": call["height"]}
        with pytest.raises(ValueError, match=f"{type(pipe).__name__} needs a {word} that is a multiple of"):
            refuse_size(pipe, **size | {word: size[word] + change})


@pytest.mark.parametrize("name", ["flux", "qwen-image", "wan"])
def test_a_multiple_is_not_rounded(name: str) -> None:
    """The smallest step that passes changes the picture: nothing finer is needed, nothing coarser is made."""
    pipe = TINY[name].build()
    pipe.set_progress_bar_config(disable=True)
    call = TINY[name].call(torch.Generator().manual_seed(0))
    step = next(n for n in range(1, 65) if _passes(pipe, call["width"] + n, call["height"]))
    made = pipe(**{**call, "width": call["width"] + step}, num_inference_steps=1, output_type="np")
    assert getattr(made, TINY[name].output)[0].shape[-2] == call["width"] + step


def _passes(pipe: object, width: int, height: int) -> bool:
    try:
        refuse_size(pipe, width, height)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_are_those_that_the_pipeline_makes(name: str) -> None:
    pipe = TINY[name].build()
    pipe.set_progress_bar_config(disable=True)
    fitted = fitted_frames(pipe, 12)
    call = TINY[name].call(torch.Generator().manual_seed(0)) | {"num_frames": fitted}
    made = pipe(**call, num_inference_steps=1, output_type="np")
    assert len(made.frames[0]) == fitted == 9


@pytest.mark.parametrize(("asked", "made"), [(1, 1), (4, 1), (5, 5), (6, 5), (8, 5), (10, 9), (80, 77), (81, 81)])
def test_frames_are_rounded_down(asked: int, made: int) -> None:
    assert fitted_frames(TINY["wan"].build(), asked) == made


def test_a_pipeline_of_images_has_no_frames_to_round() -> None:
    pipe = TINY["flux"].build()
    assert not makes_video(pipe)
    assert fitted_frames(pipe, 6) == 6


@pytest.mark.parametrize("frames", [0, -3, 10**9])
def test_frames_that_cannot_be_are_refused(frames: int) -> None:
    with pytest.raises(ValueError, match=rf"frames.*got {frames}"):
        fitted_frames(TINY["wan"].build(), frames)


@pytest.mark.parametrize(("width", "height"), [(0, 64), (64, 0), (-64, 64), (10**8, 64), (64, 8208), (72, 64)])
def test_sizes_that_cannot_be_are_refused(width: int, height: int) -> None:
    with pytest.raises(ValueError, match=r"WanPipeline needs a (width|height) .* got"):
        refuse_size(build_random_wan(), width, height)
