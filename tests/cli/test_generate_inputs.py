"""generate with a video to start from, another pipeline and scheduler, and another kind of file."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from PIL import Image

from dit_accel.pipelines.encode import write_mp4
from tests.cli.test_commands import SMALL, run, run_json

MODEL = ["random-wan", "--device", "cpu", "--prompt", "a cat"]


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
        (["--vae", "bf16,fast"], "vae takes some of tiled, sliced, channels_last, bf16, fp16, compiled, got fast"),
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
