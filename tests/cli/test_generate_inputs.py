"""generate with a video to start from, another pipeline and scheduler, and another kind of file."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel, WanVACEPipeline, WanVACETransformer3DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from dit_accel.pipelines.encode import write_mp4
from dit_accel.pipelines.random_wan import build_random_wan
from tests.cli.test_commands import SMALL, run, run_json

MODEL = ["random-wan", "--device", "cpu", "--prompt", "a cat"]
TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "out_channels": 16,
    "text_dim": 64,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
}


def _saved(kind: Any, transformer: Any, folder: Any) -> list[str]:
    """A pipeline of another task over the random model, as a folder that is loaded; the command's arguments."""
    from diffusers.pipelines.wan import pipeline_wan_i2v, pipeline_wan_vace

    # diffusers wants ftfy for prompts, and takes none into its requirements.
    for module in (pipeline_wan_i2v, pipeline_wan_vace):
        module.ftfy = SimpleNamespace(fix_text=str)
    parts = build_random_wan().components | {"transformer": transformer, "transformer_2": None}
    kind(**parts).save_pretrained(folder)
    return [str(folder), "--device", "cpu", "--prompt", "a cat", "--size", "64x64", "--frames", "5", "--steps", "2"]


def _pictures(folder: Any, number: int) -> list[str]:
    found = []
    for n in range(number):
        pixels = np.random.default_rng(n).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        found.append(str(folder / f"{n}.png"))
    return found


def _transformer(kind: Any = WanTransformer3DModel, **more: Any) -> Any:
    torch.manual_seed(0)
    return kind(**TINY | more)


@pytest.mark.filterwarnings("ignore:Pipelines loaded with")
def test_a_first_and_a_last_frame_a_lora_and_compiled_blocks(tmp_path, monkeypatch):
    model = _saved(WanImageToVideoPipeline, _transformer(in_channels=36), tmp_path / "model")
    first, last = _pictures(tmp_path, 2)
    other = _transformer(in_channels=36)
    other.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    state = {f"transformer.{name}": value for name, value in get_peft_model_state_dict(other).items()}
    (tmp_path / "lora").mkdir()
    torch.save(state, tmp_path / "lora" / "pytorch_lora_weights.bin")
    calls: list[dict[str, Any]] = []
    seen: list[Any] = []
    call = WanImageToVideoPipeline.__call__

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        seen.append((self.get_active_adapters(), type(self.scheduler).__name__))
        return call(self, *args, **kwargs)

    watched.__signature__ = inspect.signature(call)
    monkeypatch.setattr(WanImageToVideoPipeline, "__call__", watched)
    # Eager code in place of an hour of compiling.
    compile_with = torch.nn.Module.compile
    blocks: list[str] = []

    def eagerly(self: Any, *args: Any, **kwargs: Any) -> None:
        blocks.append(type(self).__name__)
        compile_with(self, *args, **kwargs | {"backend": "eager"})

    monkeypatch.setattr(torch.nn.Module, "compile", eagerly)
    more = ["--image", first, "--last-image", last, "--lora", str(tmp_path / "lora"), "--compile"]
    more += ["--scheduler", "UniPCMultistepScheduler", "--recipe", "pooled"]
    made = run_json("generate", *model, *more, "--out", str(tmp_path / "out.webp"))
    with Image.open(made["files"]["out"]) as animation:
        assert animation.n_frames == 5
    assert seen[-1] == (["lora-0"], "UniPCMultistepScheduler")
    assert calls[-1]["image"].getpixel((3, 5)) == Image.open(first).getpixel((3, 5))
    assert calls[-1]["last_image"].getpixel((3, 5)) == Image.open(last).getpixel((3, 5))
    assert blocks == ["WanTransformerBlock"] * 2
    assert made["summary"]["sparse_calls"] == 2 * 2  # branches and layers, in the second step
    torch._dynamo.reset()


def test_a_video_a_mask_and_references(tmp_path, monkeypatch):
    transformer = _transformer(WanVACETransformer3DModel, in_channels=16, vace_layers=[0], vace_in_channels=96)
    model = _saved(WanVACEPipeline, transformer, tmp_path / "model")
    pictures = _pictures(tmp_path, 3)
    clip = tmp_path / "clip.mp4"
    write_mp4(np.random.default_rng(9).integers(0, 256, (5, 64, 64, 3), np.uint8), clip, 8.0, crf=0)
    calls: list[dict[str, Any]] = []
    call = WanVACEPipeline.__call__

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return call(self, *args, **kwargs)

    watched.__signature__ = inspect.signature(call)
    monkeypatch.setattr(WanVACEPipeline, "__call__", watched)
    more = ["--video", str(clip), "--mask", pictures[0], "--image", pictures[1], "--image", pictures[2]]
    made = run_json("generate", *model, *more, "--recipe", "pooled", "--out", str(tmp_path / "out.mp4"))
    assert iio.imread(made["files"]["out"]).shape[0] == 5
    assert len(calls[-1]["video"]) == len(calls[-1]["mask"]) == 5
    assert len(calls[-1]["reference_images"]) == 2
    # The control block attends too.
    assert made["summary"]["sparse_calls"] == 2 * (2 + 1)


def test_video_to_video_as_a_gif(tmp_path, monkeypatch):
    # diffusers wants ftfy for prompts, and takes none into its requirements.
    from diffusers.pipelines.wan import pipeline_wan_video2video

    monkeypatch.setattr(pipeline_wan_video2video, "ftfy", SimpleNamespace(fix_text=str), raising=False)
    clip = tmp_path / "clip.mp4"
    write_mp4(np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8), clip, 8.0, crf=0)
    more = ["--pipeline", "WanVideoToVideoPipeline", "--video", str(clip), "--scheduler", "UniPCMultistepScheduler"]
    made = run_json("generate", *MODEL, "--size", "64x64", "--steps", "4", *more, "--out", str(tmp_path / "out.gif"))
    with Image.open(made["files"]["out"]) as gif:
        assert gif.n_frames == made["settings"]["frames"] == 9
    assert made["settings"]["width"] == 64


def test_what_cannot_be_is_said_before_the_model_is_loaded(tmp_path):
    for options, words in (
        (["--image", str(tmp_path / "gone.png")], "There is no picture at"),
        (["--video", str(tmp_path / "gone.mp4")], "There is no video at"),
        (["--offload", "disk"], "Offloading must be one of model, sequential, group, got 'disk'"),
        (["--offload", "model"], "the device is the CPU"),
        (["--pipeline", "NoPipeline"], "diffusers has no pipeline 'NoPipeline'"),
        (["--linear", "fp4"], "linear must be one of fp8, int8, or None, got 'fp4'"),
        (["--vae", "bf16,fast"], "vae takes some of tiled, sliced, channels_last, bf16, fp16, compiled"),
    ):
        result = run("generate", *MODEL, *SMALL, *options, "--out", str(tmp_path / "x.mp4"))
        assert result.exit_code == 2
        assert words in result.stderr
        assert "RANDOM weights" not in result.stderr


def test_what_the_pipeline_does_not_take_is_said(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for options, words in (
        (["--image", str(tmp_path / "a.png")], "takes no image; it takes a prompt alone. Another pipeline"),
        (["--scheduler", "NoScheduler"], "diffusers has no scheduler 'NoScheduler'"),
        (["--lora", "no/such/lora"], "The LoRA 'no/such/lora' cannot be loaded"),
        (["--pipeline", "FluxPipeline"], "FluxPipeline"),
    ):
        result = run("generate", *MODEL, *SMALL, *options)
        assert result.exit_code == 2, result.stderr
        assert words in result.stderr


def test_the_autoencoder_of_the_accelerated_side_is_set_and_said(tmp_path):
    out = tmp_path / "x.mp4"
    plain = run_json("generate", *MODEL, *SMALL, "--recipe", "dense", "--out", str(out))
    assert plain["summary"]["changes"] == []
    more = ["--compare-dense", "--vae", "channels_last,bf16"]
    made = run_json("generate", *MODEL, *SMALL, "--recipe", "dense", *more, "--out", str(tmp_path / "y.mp4"))
    assert made["summary"]["changes"] == ["autoencoder: channels_last, bf16"]
    assert made["psnr_db"] != "inf"  # the dense side decodes in float32
