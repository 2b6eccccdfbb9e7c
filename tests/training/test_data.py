"""Samples from clips, from the model itself, and from files; what is broken is named and counted."""

from __future__ import annotations

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from dit_accel.pipelines.random_wan import build_random_wan
from dit_accel.training.data import capture_call, encode_clips, generate_samples, read_video, trained_transformer
from dit_accel.training.fitness import refuse_other_latents
from dit_accel.training.samples import LatentFolder, Sample, collate, read_sample, save_sample
from tests.tiny import TINY

FLOW = ["wan", "hunyuan", "ltx", "flux", "sd3", "qwen-image"]


@pytest.mark.parametrize("family", FLOW)
def test_self_generated_samples_run_through_the_model(family, tmp_path):
    """A sample holds all that the forward needs, and at sigma 0 of the schedule the final latents."""
    tiny = TINY[family]
    pipe = tiny.build()
    call = tiny.call(torch.Generator().manual_seed(0))
    size = {k: call.pop(k) for k in ("height", "width", "num_frames") if k in call}
    folder = generate_samples(pipe, [call, call], tmp_path, settings={**size, "num_inference_steps": 2}, seed=3)
    data = LatentFolder(folder)
    assert len(data) == 2
    one, two = data[0], data[1]
    assert not torch.equal(one.latents, two.latents)
    again = tiny.run(pipe, steps=2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(one.latents.flatten().sort().values, again.flatten().sort().values)
    latents, condition = collate([one], torch.device("cpu"))
    refuse_other_latents(pipe.transformer, one)
    with pytest.raises(ValueError, match="The sample x is of another model"):
        refuse_other_latents(pipe.transformer, Sample("x", torch.zeros(1, 3, 5, 7), 1.0, {}))
    out = pipe.transformer(
        hidden_states=latents, timestep=torch.tensor([0.5 * one.timestep_scale]), return_dict=False, **condition
    )[0]
    assert out.shape == latents.shape
    assert torch.isfinite(out).all()


def test_samples_that_are_there_are_kept(tmp_path):
    tiny = TINY["wan"]
    pipe = tiny.build()
    call = tiny.call(torch.Generator().manual_seed(0)) | {"num_inference_steps": 1}
    generate_samples(pipe, [call], tmp_path)
    stamp = (tmp_path / "generated-000000.safetensors").stat().st_mtime_ns
    generate_samples(pipe, [call, call], tmp_path)
    assert (tmp_path / "generated-000000.safetensors").stat().st_mtime_ns == stamp
    assert len(LatentFolder(tmp_path)) == 2


def test_clips_with_captions(tmp_path, caplog):
    clips = tmp_path / "clips"
    clips.mkdir()
    rng = np.random.default_rng(0)
    for name, frames in (("good", 9), ("short", 2), ("mute", 9)):
        iio.imwrite(clips / f"{name}.mp4", rng.integers(0, 255, (frames, 64, 96, 3), dtype=np.uint8), fps=8)
    for name in ("good", "short", "broken", "lost"):
        (clips / f"{name}.txt").write_text(f"a {name} clip")
    (clips / "broken.mp4").write_bytes(b"this is no video")
    pipe = build_random_wan()
    size = {"width": 48, "height": 32, "frames": 5}
    skipped = encode_clips(pipe, clips, tmp_path / "latents", **size)
    assert {item.name for item in skipped} == {"short.mp4", "mute.mp4", "broken.mp4", "lost.txt"}
    reasons = {item.name: item.reason for item in skipped}
    assert "2 frames, 5 are needed" in reasons["short.mp4"]
    assert "caption is missing" in reasons["mute.mp4"]
    assert "clip is missing" in reasons["lost.txt"]
    said = caplog.text
    assert all(item.name in said for item in skipped)
    assert "Skipped 4 of 5 files." in said
    (sample,) = list(LatentFolder(tmp_path / "latents"))
    assert sample.name == "good"
    # The same latents as the autoencoder's own, normalised with its statistics.
    video = read_video(clips / "good.mp4", 48, 32, 5)
    assert video.shape == (1, 3, 5, 32, 48)
    raw = pipe.vae.encode(video).latent_dist.mode()
    mean, std = (
        torch.tensor(s).view(1, -1, 1, 1, 1) for s in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    torch.testing.assert_close(sample.latents, (raw - mean) / std)
    prompt = pipe.encode_prompt("a good clip", do_classifier_free_guidance=False, max_sequence_length=512)[0]
    torch.testing.assert_close(sample.condition["encoder_hidden_states"], prompt)


def _unpacked(family, pipe, latents, size):
    """By the pipeline's own inverse, which its decoding uses: latents as the autoencoder made them."""
    vae = pipe.vae
    if family == "ltx":
        frames = (size["frames"] - 1) // pipe.vae_temporal_compression_ratio + 1
        height, width = (size[side] // pipe.vae_spatial_compression_ratio for side in ("height", "width"))
        latents = pipe._unpack_latents(latents, frames, height, width, 1, 1)
        return pipe._denormalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    if family == "qwen-image":
        latents = pipe._unpack_latents(latents, size["height"], size["width"], pipe.vae_scale_factor)
        mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
        return latents * std + mean
    if family == "flux":
        latents = pipe._unpack_latents(latents, size["height"], size["width"], pipe.vae_scale_factor)
    return latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)


@pytest.mark.parametrize("family", ["ltx", "flux", "qwen-image", "sd3", "hunyuan"])
def test_clips_of_every_family(family, tmp_path, monkeypatch):
    """Packed or not, videos and images: a sample fits the forward, and unpacks to what the autoencoder made."""
    tiny = TINY[family]
    pipe = tiny.build()
    call = tiny.call(torch.Generator().manual_seed(0))
    prompt = {name: value for name, value in call.items() if "prompt" in name}
    ends = {
        "ltx": ("prompt_embeds", "prompt_attention_mask") * 2,
        "flux": ("prompt_embeds", "pooled_prompt_embeds", None),
        "qwen-image": ("prompt_embeds", "prompt_embeds_mask"),
        "sd3": ("prompt_embeds", "prompt_embeds", "pooled_prompt_embeds", "pooled_prompt_embeds"),
        "hunyuan": ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"),
    }[family]
    encoded = tuple(torch.zeros(16, 3) if name is None else prompt[name] for name in ends)
    monkeypatch.setattr(pipe, "encode_prompt", lambda *args, **kwargs: encoded)
    if family == "ltx":
        pipe.vae.latents_mean += 0.25
        pipe.vae.latents_std *= 2.0
    elif family == "qwen-image":
        pipe.vae.register_to_config(latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0])
    video = "num_frames" in call
    size = {"width": call["width"], "height": call["height"], "frames": call.get("num_frames", 1)}
    clips = tmp_path / "clips"
    clips.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (size["frames"], 96, 128, 3), dtype=np.uint8)
    name = "one.mp4" if video else "one.png"
    iio.imwrite(clips / name, pixels if video else pixels[0])
    (clips / "one.txt").write_text("anything")
    assert encode_clips(pipe, clips, tmp_path / "latents", **size) == []
    (sample,) = list(LatentFolder(tmp_path / "latents"))
    picture = read_video(clips / name, **size)
    picture = picture[:, :, 0] if family in ("flux", "sd3") else picture
    raw = pipe.vae.encode(picture).latent_dist.mode()
    torch.testing.assert_close(_unpacked(family, pipe, sample.latents, size), raw, rtol=1e-4, atol=1e-4)
    latents, condition = collate([sample], torch.device("cpu"))
    out = pipe.transformer(
        hidden_states=latents, timestep=torch.tensor([0.5 * sample.timestep_scale]), return_dict=False, **condition
    )[0]
    assert out.shape == latents.shape


def test_image_models_take_one_frame(tmp_path):
    with pytest.raises(ValueError, match="FluxPipeline makes images, got num_frames = 5"):
        capture_call(TINY["flux"].build(), {"prompt": "a fish", "num_frames": 5})


def test_broken_samples_are_named_and_skipped(tmp_path, caplog):
    sample = Sample("one", torch.randn(1, 4), 1000.0, {"text": torch.randn(1, 3), "size": (4, 5)})
    save_sample(sample, tmp_path / "one.safetensors")
    (tmp_path / "two.safetensors").write_bytes(b"nothing")
    data = LatentFolder(tmp_path)
    assert len(data) == 1
    assert [item.name for item in data.skipped] == ["two.safetensors"]
    said = caplog.text
    assert "two.safetensors" in said
    assert "Skipped 1 of 2 files." in said
    (tmp_path / "one.safetensors").unlink()
    with pytest.raises(ValueError, match="no usable sample"):
        LatentFolder(tmp_path)
    with pytest.raises(ValueError, match="There is no folder"):
        LatentFolder(tmp_path / "nowhere")


def test_samples_round_trip(tmp_path):
    condition = {
        "text": torch.randn(1, 3).half(),
        "rotary": (torch.randn(5, 2), torch.randn(5, 2)),
        "shapes": [[1, 2, 3]],
        "flag": True,
    }
    save_sample(Sample("x", torch.randn(1, 2, 2), 1.0, condition), tmp_path / "x.safetensors")
    back = read_sample(tmp_path / "x.safetensors")
    assert back.timestep_scale == 1.0
    assert back.condition.keys() == condition.keys()
    assert torch.equal(back.condition["text"], condition["text"])
    assert all(map(torch.equal, back.condition["rotary"], condition["rotary"]))
    assert back.condition["shapes"] == [[1, 2, 3]]
    with pytest.raises(ValueError, match="cannot be saved"):
        save_sample(Sample("x", torch.zeros(1), 1.0, {"odd": object()}), tmp_path / "y.safetensors")


def test_batches(tmp_path):
    ids = torch.randn(7, 3)
    made = [Sample("a", torch.randn(1, 2, 2), 1.0, {"text": torch.randn(1, 5), "ids": ids}) for _ in range(3)]
    latents, condition = collate(made, torch.device("cpu"))
    assert latents.shape == (3, 2, 2)
    assert condition["text"].shape == (3, 5)
    assert torch.equal(condition["ids"], ids)
    with pytest.raises(ValueError, match="must have one size"):
        collate([made[0], Sample("b", torch.randn(1, 3, 2), 1.0, {})], torch.device("cpu"))


def test_pipelines_that_cannot_be_trained():
    with pytest.raises(ValueError, match="WanPipeline has no transformer_2 to fine-tune; it has transformer"):
        trained_transformer(TINY["wan"].build(), "transformer_2")
    pipe = TINY["cogvideox"].build()
    pipe.scheduler.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match="CogVideoXDDIMScheduler and prediction_type 'score'"):
        trained_transformer(pipe)


def test_capturing_leaves_no_hook():
    tiny = TINY["wan"]
    pipe = tiny.build()
    call = tiny.call(torch.Generator().manual_seed(0))
    call.pop("guidance_scale", None)
    captured = capture_call(pipe, call)
    assert captured.timestep_scale == 1000.0
    assert captured.noised is None
    assert "encoder_hidden_states" in captured.condition
    assert not pipe.transformer._forward_pre_hooks
    assert tiny.run(pipe, steps=1).shape == captured.latents.shape
