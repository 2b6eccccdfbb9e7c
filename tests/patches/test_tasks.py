"""Other tasks than text to video or image: first and last frames, references, edits, inpainting, conditions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

import dit_accel
from dit_accel.layout import LatentGrid, TokenLayout
from tests.patches.test_modular import RECIPE, STEPS, _error
from tests.tiny import TINY

Built = tuple[Any, dict[str, Any]]


def _picture(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def _over(family: str, kind: str, **parts: Any) -> Any:
    """Another of diffusers' pipelines over the parts of a tiny one."""
    cls = getattr(diffusers, kind)
    given = TINY[family].build().components | parts
    wanted = inspect.signature(cls.__init__).parameters
    missing = {name: None for name, one in wanted.items() if name != "self" and one.default is inspect.Parameter.empty}
    pipe = cls(**missing | {name: part for name, part in given.items() if name in wanted})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _remade(family: str, **changes: Any) -> Any:
    """The tiny pipeline's transformer with another config."""
    model = TINY[family].build().transformer
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    return type(model)(**config | changes).eval()


def _first_and_last_frame() -> Built:
    pipe = _over("wan", "WanImageToVideoPipeline", transformer=_remade("wan", in_channels=36))
    return pipe, {"image": _picture(96, 112), "last_image": _picture(96, 112, 1)}


def _vace() -> Built:
    from PIL import Image

    pictures = [Image.new("RGB", (112, 96), color) for color in ("red", "green", "blue")]
    return TINY["wan-vace"].build(), {
        "video": [pictures[0]] * 9,
        "mask": [Image.new("L", (112, 96), 255)] * 9,
        "reference_images": pictures[1:],
    }


def _ltx(kind: str) -> Callable[[], Built]:
    return lambda: (_over("ltx", kind), {"image": _picture(32, 64), "height": 32, "width": 64})


def _flux(kind: str, size: tuple[int, int] = (24, 40), **more: Any) -> Callable[[], Built]:
    given = {"image": _picture(*size), "height": size[0], "width": size[1]} | more
    return lambda: (_over("flux", kind), given)


def _flux_fill() -> Built:
    # Latents, the hidden picture and its mask: 4, 4 and 4 channels of a token.
    model = _remade("flux", in_channels=12, out_channels=4)
    given = {"image": _picture(24, 40), "mask_image": _picture(24, 40)[:, :1].round(), "height": 24, "width": 40}
    return _over("flux", "FluxFillPipeline", transformer=model), given


def _cogvideox() -> Built:
    model = _remade("cogvideox", in_channels=8)
    return _over("cogvideox", "CogVideoXImageToVideoPipeline", transformer=model), {"image": _picture(96, 112)}


MASK = _picture(24, 40, 3)[:, :1].round()
WAN, FLUX = TokenLayout((3, 6, 7), 0, 126), TokenLayout((1, 12, 20), 16, 256)
# What to build and call, the layout of its longest sequence, and the first step that runs.
TASKS: dict[str, tuple[str, Callable[[], Built], TokenLayout, int]] = {
    "first and last frame": ("wan", _first_and_last_frame, WAN, 0),
    # Two references are frames before the video.
    "vace": ("wan-vace", _vace, TokenLayout((5, 6, 7), 0, 210), 0),
    "condition": ("ltx", _ltx("LTXConditionPipeline"), TokenLayout((3, 8, 16), 0, 384), 0),
    "image to video": ("ltx", _ltx("LTXImageToVideoPipeline"), TokenLayout((3, 8, 16), 0, 384), 0),
    "cogvideox image to video": ("cogvideox", _cogvideox, TokenLayout((3, 6, 7), 16, 142), 0),
    "image to image": ("flux", _flux("FluxImg2ImgPipeline", strength=0.75), FLUX, 1),
    "inpaint": ("flux", _flux("FluxInpaintPipeline", mask_image=MASK, strength=0.75), FLUX, 1),
    "fill": ("flux", _flux_fill, FLUX, 0),
    "kontext": (
        "flux",
        _flux("FluxKontextPipeline", max_area=24 * 40, _auto_resize=False),
        TokenLayout((1, 12, 20), 16, 496, (LatentGrid((1, 12, 20), 256),)),
        0,
    ),
    "kontext inpaint": (
        "flux",
        _flux("FluxKontextInpaintPipeline", mask_image=MASK, strength=0.75, max_area=24 * 40, _auto_resize=False),
        TokenLayout((1, 12, 20), 16, 496, (LatentGrid((1, 12, 20), 256),)),
        1,
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_runs_sparse_where_its_latents_lie(name: str) -> None:
    family, build, layout, first = TASKS[name]
    pipe, more = build()
    pipe.set_progress_bar_config(disable=True)

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        given = TINY[family].call(generator) | more
        known = inspect.signature(type(pipe).__call__).parameters
        given = {key: value for key, value in given.items() if key in known}
        out = pipe(**given, num_inference_steps=STEPS, generator=generator, output_type="latent", return_dict=False)
        return out[0]

    plain = run()
    with dit_accel.patch(pipe, "dense"):
        assert torch.equal(run(), plain)
    calls: list[Any] = []
    outputs: list[torch.Tensor] = []
    with (
        dit_accel.patch(pipe, RECIPE, backend="torch") as handle,
        handle.observe(lambda _, call: calls.append(call)),
        handle.tap_outputs(lambda _, out, __: outputs.append(out.clone()) or out),
    ):
        out = run()
        summary = handle.summary()
    assert {call.layout for call in calls} == {layout}
    assert {call.step.index for call in calls} == set(range(first, STEPS))
    assert set(summary.dense_calls) <= {"dense phase"}
    assert summary.density < 1
    assert not torch.allclose(out, plain, rtol=1e-3)
    bound = layout.seq_len * torch.finfo(torch.float32).eps
    assert any(call.plan is not None for call in calls)
    for call, given_out in zip(calls, outputs, strict=True):
        assert call.plan is None or _error(call, given_out) <= bound
    assert torch.equal(run(), plain)
