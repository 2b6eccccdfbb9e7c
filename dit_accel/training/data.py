"""Where training samples come from: clips with captions, or the dense model itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .config import TRANSFORMERS
from .samples import Sample, Skipped, report_skipped, save_sample

CLIP_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".gif", ".png", ".jpg", ".jpeg", ".webp")


class _Reached(Exception):
    """The transformer was called: its arguments are known."""


def trained_transformer(pipe: Any, name: str = "transformer") -> Any:
    """The named transformer of a flow-matching pipeline.

    Raises:
        ValueError: none of that name, or another kind of diffusion.
    """
    model = getattr(pipe, name, None)
    if model is None:
        found = [other for other in TRANSFORMERS if getattr(pipe, other, None) is not None]
        raise ValueError(f"{type(pipe).__name__} has no {name} to fine-tune; it has {', '.join(found) or 'none'}.")
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


def sigma_range(pipe: Any, name: str = "transformer") -> tuple[float, float]:
    """The sigmas that a transformer denoises: all, or its side of the boundary between two experts.

    Wan 2.2's ``transformer`` takes the timesteps from ``boundary_ratio`` up, ``transformer_2`` those below.
    """
    boundary = dict(getattr(pipe, "config", {})).get("boundary_ratio")
    if boundary is None or getattr(pipe, "transformer_2", None) is None:
        return 0.0, 1.0
    return (float(boundary), 1.0) if name == "transformer" else (0.0, float(boundary))


def capture_call(pipe: Any, arguments: Mapping[str, Any]) -> tuple[torch.Size, float, dict[str, Any]]:
    """What the pipeline gives its transformer for these arguments, without running it.

    This way every family's conditioning is made by its own pipeline.

    Returns:
        Shape of ``hidden_states``, factor from sigma to ``timestep``, and the other arguments.
    """
    # The first step is at full noise, so of two experts this is the one that is called.
    model = trained_transformer(pipe)
    takes = inspect.signature(type(pipe).__call__).parameters
    if "num_frames" not in takes and arguments.get("num_frames", 1) != 1:
        raise ValueError(f"{type(pipe).__name__} makes images, got num_frames = {arguments['num_frames']}.")
    arguments = {name: value for name, value in arguments.items() if name != "num_frames" or name in takes}
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
            latents = encode_video(pipe, video)
            if latents.shape != shape:
                raise ValueError(
                    f"{type(pipe).__name__} denoises latents {list(shape)}, its autoencoder makes "
                    f"{list(latents.shape)}; train it on precomputed or self-generated samples."
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


def encode_video(pipe: Any, video: torch.Tensor) -> torch.Tensor:
    """Latents of a clip as the transformer takes them: normalised, and packed where the pipeline packs.

    Args:
        video: ``[1, 3, F, H, W]`` in [-1, 1]; one frame for image models.
    """
    vae = pipe.vae
    kernel = next(weight for weight in vae.encoder.parameters() if weight.dim() >= 4)
    pixels = video if kernel.dim() == 5 else video[:, :, 0]
    with torch.no_grad():
        latents: torch.Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()
    return _pack(pipe, _normalise(pipe, latents))


def _normalise(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    vae, config = pipe.vae, pipe.vae.config
    if hasattr(pipe, "_normalize_latents"):
        normalised: torch.Tensor = pipe._normalize_latents(
            latents, vae.latents_mean, vae.latents_std, config.scaling_factor
        )
        return normalised
    if getattr(config, "latents_mean", None) is not None:
        shape = (1, -1, *[1] * (latents.dim() - 2))
        mean = torch.tensor(config.latents_mean, device=latents.device).view(shape)
        std = torch.tensor(config.latents_std, device=latents.device).view(shape)
        return (latents - mean) / std
    shift = getattr(config, "shift_factor", None) or 0.0
    return (latents - shift) * config.scaling_factor


def _pack(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Tokens in one line, patches in the channels. LTX takes its patch sizes, Flux and Qwen the latents' sizes."""
    pack = getattr(pipe, "_pack_latents", None)
    if pack is None:
        return latents
    if "patch_size" in inspect.signature(pack).parameters:
        packed: torch.Tensor = pack(latents, pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size)
        return packed
    height, width = latents.shape[-2:]
    packed = pack(latents.contiguous(), latents.shape[0], latents.shape[1], height, width)
    return packed


def _without_guidance(pipe: Any) -> dict[str, float]:
    """Arguments that spare the unconditional call; a guidance-distilled model keeps its guidance."""
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
