"""Where training samples come from: clips with captions, or the dense model itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import refuse_unwritable_folder
from .clips import CaptionedClip, find_clips, read_video, with_captions
from .config import TRANSFORMERS
from .noise import noise_process
from .origin import Origin
from .samples import Sample, Skipped, is_sample, report_skipped, save_sample, spread_over


class _Reached(Exception):
    """The transformer was called: its arguments are known."""


def trained_transformer(pipe: Any, name: str = "transformer") -> Any:
    """The named transformer of a pipeline.

    Raises:
        ValueError: none of that name, or a scheduler that does not tell what the model predicts.
    """
    model = getattr(pipe, name, None)
    if model is None:
        found = [other for other in TRANSFORMERS if getattr(pipe, other, None) is not None]
        raise ValueError(f"{type(pipe).__name__} has no {name} to fine-tune; it has {', '.join(found) or 'none'}.")
    noise_process(pipe, name, None)
    return model


@dataclass(frozen=True, eq=False)
class CapturedCall:
    """What a pipeline gives its transformer in the first step, at full noise.

    Attributes:
        latents: ``hidden_states``.
        timestep_scale: factor from sigma to ``timestep``.
        noised: see :class:`~dit_accel.training.samples.Sample`.
        condition: the other arguments.
    """

    latents: torch.Tensor
    timestep_scale: float
    noised: torch.Tensor | None
    condition: dict[str, Any]

    def sample(self, name: str, latents: torch.Tensor, without_prompt: CapturedCall | None = None) -> Sample:
        """A sample of these arguments, with clean latents; what the pipeline holds clean is what it gave."""
        if self.noised is not None:
            latents = torch.where(spread_over(self.noised, latents.shape) > 0, latents, self.latents.to(latents))
        unconditional = None
        if without_prompt is not None:
            unconditional = {k: v for k, v in without_prompt.condition.items() if not _same(v, self.condition.get(k))}
        return Sample(name, latents, self.timestep_scale, self.condition, self.noised, unconditional)


def capture_call(pipe: Any, arguments: Mapping[str, Any]) -> CapturedCall:
    """What the pipeline gives its transformer for these arguments, without running it.

    This way every family's conditioning is made by its own pipeline.

    Raises:
        ValueError: frames of a pipeline that makes images, or a timestep that is of no known parts of the latents.
    """
    # The first step is at full noise, so of two experts this is the one that is called.
    model = trained_transformer(pipe)
    takes = inspect.signature(type(pipe).__call__).parameters
    if "num_frames" not in takes and arguments.get("num_frames", 1) != 1:
        raise ValueError(f"{type(pipe).__name__} makes images, got num_frames = {arguments['num_frames']}.")
    arguments = {name: value for name, value in arguments.items() if name != "num_frames" or name in takes}
    seen: dict[str, Any] = {}

    def stop(_module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
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
    # The first step is at full noise, so that 1 and num_train_timesteps are far apart.
    steps, most = float(pipe.scheduler.config.num_train_timesteps), float(timestep.max())
    noised = None
    if timestep.dim() > 1:
        noised = (timestep / most).float()
        if not ((noised == 0) | (noised == 1)).all():
            raise ValueError(
                f"{type(pipe).__name__} gives its tokens timesteps between 0 and {most:g} in one step; such models "
                "cannot be fine-tuned yet."
            )
        spread_over(noised, latents.shape)
    scale = steps if most > 1.5 else 1.0
    return CapturedCall(latents, scale, noised, {k: v for k, v in seen.items() if v is not None})


def without_prompt(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments with what is to be avoided in place of the prompt, as guidance compares with.

    Raises:
        ValueError: the prompt is an embedding, and there is none of what is to be avoided.
    """
    negative = {k.removeprefix("negative_"): v for k, v in call.items() if k.startswith("negative_") and v is not None}
    if "prompt_embeds" in call and "prompt_embeds" not in negative:
        raise ValueError("A teacher with guidance needs negative_prompt_embeds beside prompt_embeds, got none.")
    empty = {"prompt": ""} if "prompt" in call else {}
    return {k: v for k, v in call.items() if not k.startswith("negative_")} | empty | negative


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)


def generate_samples(
    pipe: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    folder: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    dense: Callable[[], Any] = nullcontext,
    progress: Callable[[int, int], None] | None = None,
    start_over: bool = False,
    unconditional: bool = False,
) -> Path:
    """Let the model itself make the training data: no clips are needed.

    The folder keeps what made its samples (``samples.json``). Samples that the same model, settings, seed and prompts
    have made there before are kept, whether all were finished or not; more prompts add samples.

    Args:
        prompts: one a sample; or a call's arguments (``prompt_embeds`` ...) for pipelines without text
            encoder.
        folder: gets one file a sample.
        settings: of the pipeline's call, e.g. height, width, num_frames, num_inference_steps,
            guidance_scale.
        seed: of the noise; sample ``i`` uses ``seed + i``.
        dense: context in which the pipeline is dense, ``handle.disabled`` of a patched one.
        progress: called with the samples done and their number.
        start_over: move samples that other settings made to a folder ``earlier-1`` in ``folder``, and make new ones.
        unconditional: also keep what the transformer is given without the prompt, for a teacher with guidance.

    Returns:
        The folder, for :class:`~dit_accel.training.samples.LatentFolder`.

    Raises:
        ValueError: no prompts, a folder that cannot be written or holds samples of other settings, or a model whose
            latents are not what its transformer takes.
    """
    if not prompts:
        raise ValueError("There is no prompt to generate samples from; give one a sample.")
    folder, settings = Path(folder), dict(settings or {})
    refuse_unwritable_folder(folder)
    paths = [folder / f"generated-{index:06d}.safetensors" for index in range(len(prompts))]
    made_from = {path.stem: {"prompt": prompt} for path, prompt in zip(paths, prompts, strict=True)}
    made = {"source": "the model", "seed": seed, **_with_unconditional(unconditional), **settings}
    Origin.of(pipe, made, made_from).claim(folder, start_over)
    pipe.set_progress_bar_config(disable=True)
    size = {k: v for k, v in settings.items() if k in ("height", "width", "num_frames")}
    for index, (path, prompt) in enumerate(zip(paths, prompts, strict=True)):
        if not is_sample(path):
            call = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
            own = ("guidance_scale", "true_cfg_scale", "num_inference_steps")
            plain = {k: v for k, v in call.items() if k not in own}
            captured = capture_call(pipe, plain | size)
            without = capture_call(pipe, without_prompt(plain) | size) if unconditional else None
            generator = torch.Generator("cpu").manual_seed(seed + index)
            with dense(), _last_latents(pipe.scheduler) as latents:
                pipe(**call | settings, generator=generator, output_type="latent")
            if latents[-1].shape != captured.latents.shape:
                raise ValueError(
                    f"{type(pipe).__name__} denoises latents {list(latents[-1].shape)}, its "
                    f"transformer takes {list(captured.latents.shape)}; such models cannot be fine-tuned yet."
                )
            save_sample(captured.sample(path.stem, latents[-1], without), path)
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
    start_over: bool = False,
    unconditional: bool = False,
) -> list[Skipped]:
    """Encode a folder of clips with captions into samples.

    A clip's caption is the text file of its name (``cat.mp4``, ``cat.txt``), in UTF-8. Clips are cut to their first
    ``frames`` frames, and scaled and cropped to the size. What cannot be used (broken, too short, without
    caption; a caption without clip; the second of two clips with one name) is named on stderr with a count at the end.

    The folder keeps what made its samples (``samples.json``). Samples that the same model made of the same clips are
    kept, and new clips are added.

    Args:
        clips: folder of videos or images.
        folder: gets one file a clip.
        width, height: pixels.
        frames: of a sample.
        start_over: move samples that other clips, captions or settings made to a folder ``earlier-1`` in ``folder``,
            and encode all clips anew.
        unconditional: see :func:`generate_samples`.

    Returns:
        What was left out.

    Raises:
        ValueError: no folder, no clip that can be used, a folder that cannot be written or holds samples of other
            clips or settings, or a model whose latents this cannot make.
    """
    clips, folder = Path(clips), Path(folder)
    found = find_clips(clips)
    refuse_unwritable_folder(folder)
    usable, skipped = with_captions(found, clips)
    size = {"width": width, "height": height, "num_frames": frames}
    made_from = {clip.path.stem: clip.contents() for clip in usable}
    made = {"source": "clips", **_with_unconditional(unconditional), **size}
    Origin.of(pipe, made, made_from).claim(folder, start_over)
    encoded = 0
    for index, clip in enumerate(usable):
        target = folder / f"{clip.path.stem}.safetensors"
        try:
            video = None if is_sample(target) else read_video(clip.path, width, height, frames)
        except ValueError as error:
            skipped.append(Skipped(clip.path.name, str(error)))
            continue
        if video is not None:
            save_sample(_encoded(pipe, clip, video, size, unconditional), target)
        encoded += 1
        if progress is not None:
            progress(index + 1, len(usable))
    report_skipped(skipped, sum(map(len, found.values())) + sum(item.name.endswith(".txt") for item in skipped))
    if not encoded:
        first = skipped[0]
        raise ValueError(f"{clips} holds no clip that can be used; {first.name}: {first.reason}.")
    return skipped


def _with_unconditional(unconditional: bool) -> dict[str, bool]:
    # Folders made before there was such a thing stay good where it is not asked for.
    return {"unconditional": True} if unconditional else {}


def _encoded(
    pipe: Any, clip: CaptionedClip, video: torch.Tensor, size: Mapping[str, int], unconditional: bool
) -> Sample:
    call = {"prompt": clip.caption, **size}
    captured = capture_call(pipe, call)
    latents = encode_video(pipe, video)
    if latents.shape != captured.latents.shape:
        raise ValueError(
            f"{type(pipe).__name__} denoises latents {list(captured.latents.shape)}, its autoencoder makes "
            f"{list(latents.shape)}; train it on precomputed or self-generated samples."
        )
    without = capture_call(pipe, without_prompt(call)) if unconditional else None
    return captured.sample(clip.path.stem, latents, without)


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
    """Tokens in one line, patches in the channels. LTX takes its patch sizes, Flux and Qwen the latents' sizes.
    CogVideoX has frames before channels."""
    if type(pipe).__name__.startswith("CogVideoX"):
        return latents.transpose(1, 2).contiguous()
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
