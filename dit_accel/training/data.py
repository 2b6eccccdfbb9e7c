"""Where training samples come from: clips with captions, or the dense model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .samples import Sample, Skipped, report_skipped, save_sample

CLIP_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".gif", ".png", ".jpg", ".jpeg", ".webp")


class _Reached(Exception):
    """The transformer was called: its arguments are known."""


def trained_transformer(pipe: Any) -> Any:
    """The one transformer of a flow-matching pipeline.

    Raises:
        ValueError: several transformers, none, or another kind of diffusion.
    """
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(f"{type(pipe).__name__} has two transformers; only one can be fine-tuned at a time.")
    model = getattr(pipe, "transformer", None)
    if model is None:
        raise ValueError(f"{type(pipe).__name__} has no transformer to fine-tune.")
    config = getattr(pipe.scheduler, "config", {})
    flow = "FlowMatch" in type(pipe.scheduler).__name__ or (
        config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    )
    if not flow:
        raise ValueError(
            f"Fine-tuning needs a flow-matching model; {type(pipe).__name__} comes with "
            f"{type(pipe.scheduler).__name__}."
        )
    return model


def capture_call(pipe: Any, arguments: Mapping[str, Any]) -> tuple[torch.Size, float, dict[str, Any]]:
    """What the pipeline gives its transformer for these arguments, without running it.

    This way every family's conditioning is made by its own pipeline.

    Returns:
        Shape of ``hidden_states``, factor from sigma to ``timestep``, and the other arguments.
    """
    model = trained_transformer(pipe)
    seen: dict[str, Any] = {}

    def stop(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        seen.update(kwargs)
        if args:
            raise ValueError(f"{type(pipe).__name__} calls its transformer with positional arguments.")
        raise _Reached

    hook = model.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        pipe(**_without_guidance(pipe), **arguments, num_inference_steps=1, output_type="latent")
    except _Reached:
        pass
    finally:
        hook.remove()
    latents, timestep = seen.pop("hidden_states"), seen.pop("timestep")
    seen.pop("return_dict", None)
    if timestep.dim() != 1:
        raise ValueError(f"One timestep a sample is needed, {type(pipe).__name__} gives {list(timestep.shape)}.")
    # The first step is at full noise, so that 1 and num_train_timesteps are far apart.
    steps = float(pipe.scheduler.config.num_train_timesteps)
    scale = steps if float(timestep.max()) > 1.5 else 1.0
    return latents.shape, scale, {k: v for k, v in seen.items() if v is not None}


def generate_samples(
    pipe: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    folder: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    dense: Callable[[], Any] = nullcontext,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Let the model itself make the training data: no clips are needed.

    Args:
        prompts: one a sample; or a call's arguments (``prompt_embeds`` ...) for pipelines without text
            encoder.
        folder: gets one file a sample; samples that are there already are kept.
        settings: of the pipeline's call, e.g. height, width, num_frames, num_inference_steps,
            guidance_scale.
        seed: of the noise; sample ``i`` uses ``seed + i``.
        dense: context in which the pipeline is dense, ``handle.disabled`` of a patched one.
        progress: called with the samples done and their number.

    Returns:
        The folder, for :class:`~dit_accel.training.samples.LatentFolder`.
    """
    folder, settings = Path(folder), dict(settings or {})
    pipe.set_progress_bar_config(disable=True)
    size = {k: v for k, v in settings.items() if k in ("height", "width", "num_frames")}
    for index, prompt in enumerate(prompts):
        path = folder / f"generated-{index:06d}.safetensors"
        if not path.exists():
            call = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
            own = ("guidance_scale", "true_cfg_scale", "num_inference_steps")
            plain = {k: v for k, v in call.items() if k not in own}
            shape, scale, condition = capture_call(pipe, plain | size)
            generator = torch.Generator("cpu").manual_seed(seed + index)
            with dense(), _last_latents(pipe.scheduler) as latents:
                pipe(**call | settings, generator=generator, output_type="latent")
            if latents[-1].shape != shape:
                raise ValueError(
                    f"{type(pipe).__name__} denoises latents {list(latents[-1].shape)}, its "
                    f"transformer takes {list(shape)}; such models cannot be fine-tuned yet."
                )
            save_sample(Sample(path.stem, latents[-1], scale, condition), path)
        if progress is not None:
            progress(index + 1, len(prompts))
    return folder


def encode_clips(
    pipe: Any,
    clips: str | Path,
    folder: str | Path,
    *,
    width: int,
    height: int,
    frames: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Skipped]:
    """Encode a folder of clips with captions into samples.

    A clip's caption is the text file of its name (``cat.mp4``, ``cat.txt``). Clips are cut to their first
    ``frames`` frames, and scaled and cropped to the size. What cannot be used (broken, too short, without
    caption; a caption without clip) is named on stderr with a count at the end.

    Args:
        clips: folder of videos or images.
        folder: gets one file a clip; files that are there already are kept.
        width, height: pixels.
        frames: of a sample.

    Returns:
        What was left out.

    Raises:
        ValueError: no folder, no clip, or a model whose latents this cannot make.
    """
    clips, folder = Path(clips), Path(folder)
    if not clips.is_dir():
        raise ValueError(f"There is no folder {clips}.")
    files = sorted(path for path in clips.iterdir() if path.suffix.lower() in CLIP_SUFFIXES)
    if not files:
        raise ValueError(f"{clips} holds no clip ({', '.join(CLIP_SUFFIXES)}).")
    stems = {path.stem for path in files}
    skipped = [
        Skipped(path.name, "its clip is missing") for path in sorted(clips.glob("*.txt")) if path.stem not in stems
    ]
    total = len(files) + len(skipped)
    for index, path in enumerate(files):
        target = folder / f"{path.stem}.safetensors"
        if not target.exists():
            try:
                caption = path.with_suffix(".txt").read_text().strip()
                video = read_video(path, width, height, frames)
            except FileNotFoundError:
                skipped.append(Skipped(path.name, "its caption is missing"))
                continue
            except Exception as error:  # decoders raise whatever they like for a broken file
                skipped.append(Skipped(path.name, " ".join(str(error).split())[:200]))
                continue
            size = {"width": width, "height": height, "num_frames": frames}
            shape, scale, condition = capture_call(pipe, {"prompt": caption, **size})
            latents = _encode(pipe, video)
            if latents.shape != shape:
                raise ValueError(
                    f"{type(pipe).__name__} packs its latents ({list(shape)}, not {list(latents.shape)}); "
                    "train it on precomputed or self-generated samples."
                )
            save_sample(Sample(path.stem, latents, scale, condition), target)
        if progress is not None:
            progress(index + 1, len(files))
    report_skipped(skipped, total)
    return skipped


def read_video(path: Path, width: int, height: int, frames: int) -> torch.Tensor:
    """The first frames of a clip, scaled to cover the size and cropped: float ``[1, 3, F, H, W]`` in [-1, 1].

    Raises:
        ValueError: the clip is shorter.
    """
    import imageio.v3 as iio

    picture = path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
    if picture:
        read = [np.asarray(iio.imread(path))]
    else:
        read = [frame for _, frame in zip(range(frames), iio.imiter(path), strict=False)]
    if len(read) < frames:
        raise ValueError(f"it has {len(read)} frames, {frames} are needed")
    pixels = torch.from_numpy(np.stack([frame[..., :3] for frame in read]))
    pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    scale = max(height / pixels.shape[2], width / pixels.shape[3])
    size = [max(height, round(pixels.shape[2] * scale)), max(width, round(pixels.shape[3] * scale))]
    pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    pixels = pixels[:, :, top : top + height, left : left + width]
    return pixels.clamp(-1, 1).transpose(0, 1)[None]


def _encode(pipe: Any, video: torch.Tensor) -> torch.Tensor:
    """Latents of a clip, normalised as the model was trained on them."""
    vae = pipe.vae
    with torch.no_grad():
        latents: torch.Tensor = vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode().float()
    config = vae.config
    if getattr(config, "latents_mean", None) is not None:
        shape = (1, -1, *[1] * (latents.dim() - 2))
        mean = torch.tensor(config.latents_mean, device=latents.device).view(shape)
        std = torch.tensor(config.latents_std, device=latents.device).view(shape)
        return (latents - mean) / std
    shift = getattr(config, "shift_factor", None) or 0.0
    return (latents - shift) * config.scaling_factor


def _without_guidance(pipe: Any) -> dict[str, float]:
    """Arguments that spare the unconditional call; a guidance-distilled model keeps its guidance."""
    import inspect

    if getattr(pipe.transformer.config, "guidance_embeds", False):
        return {}
    takes = inspect.signature(type(pipe).__call__).parameters
    return {name: 1.0 for name in ("guidance_scale", "true_cfg_scale") if name in takes}


@contextmanager
def _last_latents(scheduler: Any) -> Iterator[list[torch.Tensor]]:
    """The latents after the last step of a run, as the transformer would see them."""
    original = scheduler.step
    found: list[torch.Tensor] = []

    def step(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        found[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
        return result

    scheduler.step = step
    try:
        yield found
    finally:
        del scheduler.step
