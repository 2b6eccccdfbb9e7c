"""The parts of ``sparse_finetuning.py``, each in a process of its own: clips, one training, and the judge of clips."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finetuning_variants import SEARCH_PROMPTS, VARIANTS

CLIP_SETS = ("training-free", "trained")
COMPARED_CLIPS = 8


def prepare(args: argparse.Namespace) -> None:
    """Render, encode and describe the clips: ``data.safetensors``, ``data.json``, then the file ``ready``."""
    import torch
    from captions import caption, sample_scene
    from clip_autoencoder import encode_clip, latent_statistics
    from compose import ClipGeometry, render_clips
    from safetensors.torch import save_file
    from sprites import SpriteBank, load_sprites

    from dit_accel.pipelines import load
    from dit_accel.training.data import capture_call

    device = torch.device(args.device)
    pipe = load(args.model, dtype=model_dtype(device), device=device)
    vae = pipe.vae.eval()
    geometry = ClipGeometry(args.frames, *args.size)
    bank = SpriteBank(load_sprites(args.sprites), device)
    mean, std = latent_statistics(vae, device)
    rng, textures = random.Random(1), torch.Generator(device).manual_seed(1)
    size = pixels(args)
    captured = capture_call(pipe, {"prompt": "a fish", **size})
    shape, scale, condition = captured.latents.shape, captured.timestep_scale, captured.condition
    text = condition.pop("encoder_hidden_states")
    store = torch.bfloat16
    # Held out: combinations of subject, place and motion that neither the model nor this training sees.
    scenes = [sample_scene(rng) for _ in range(args.clips)]
    # One caption in ten is dropped, as when the model was trained, so that guidance goes on working.
    captions = ["" if rng.random() < 0.1 else caption(scene, rng) for scene in scenes]
    held_out = [sample_scene(rng, held_out=True) for _ in range(args.held_out)]
    scenes, captions = scenes + held_out, captions + [caption(scene) for scene in held_out]
    latents = torch.empty(len(scenes), *shape[1:], dtype=store)
    texts = torch.empty(len(scenes), *text.shape[1:], dtype=store)
    with torch.no_grad():
        for first in range(0, len(scenes), args.chunk):
            part = slice(first, first + args.chunk)
            clips, _ = render_clips(scenes[part], bank, geometry, rng, textures)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                posterior = encode_clip(vae, clips.contiguous(memory_format=torch.channels_last_3d))
            latents[part] = ((posterior.chunk(2, dim=1)[0].float() - mean) / std).to(store).cpu()
            embeds, _ = pipe.encode_prompt(
                captions[part], do_classifier_free_guidance=False, max_sequence_length=text.shape[1]
            )
            texts[part] = embeds.to(store).cpu()
    save_file({"latents": latents, "text": texts}, args.work / "data.safetensors")
    data = {"scale": scale, "condition": {k: v for k, v in condition.items() if v is not None}}
    (args.work / "data.json").write_text(json.dumps(data))
    (args.work / "ready").touch()
    say(args, f"{len(scenes)} clips encoded, latents of std {float(latents.float().std()):.3f}")


class Clips:
    """The encoded clips as training samples, on the device; the last ones are held out by the loop."""

    def __init__(self, work: Path, device: Any) -> None:
        from safetensors.torch import load_file

        tensors = load_file(work / "data.safetensors", device=str(device))
        self.latents, self.text = tensors["latents"], tensors["text"].to(model_dtype(device))
        self.about = json.loads((work / "data.json").read_text())

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, index: int) -> Any:
        from dit_accel.training.samples import Sample

        condition = {"encoder_hidden_states": self.text[index : index + 1], **self.about["condition"]}
        return Sample(f"clip-{index}", self.latents[index : index + 1], self.about["scale"], condition)


def train(args: argparse.Namespace) -> None:
    """One variant, to ``VARIANT/result.json``."""
    import torch

    from dit_accel import presets
    from dit_accel.training.config import FinetuneConfig
    from dit_accel.training.finetune import finetune
    from dit_accel.training.objective import OBJECTIVES

    variant, device = VARIANTS[args.variant], torch.device(args.device)
    torch.set_num_threads(1 if device.type == "cuda" else torch.get_num_threads())
    recipe = presets.resolve(variant.recipe, **variant.options).with_fields(variant.fields)
    steps = min(args.steps, variant.steps or args.steps)
    config = FinetuneConfig(
        steps=steps,
        batch_size=args.batch,
        learning_rate=args.learning_rate * variant.rate,
        warmup_steps=min(20, steps),
        decay="cosine",
        train=variant.train,
        density_start=variant.density_start,
        density_steps=steps // 2 if variant.density_start else 0,
        shift=args.shift,
        objective=OBJECTIVES[variant.objective],
        precision="bf16" if device.type == "cuda" else "no",
        ema_decay=0.99,
        # All weights of the embedded model are 18 MB in bfloat16.
        adapter_dtype="int8" if variant.train == "all" else "model",
        evaluate_every=args.evaluate_every if variant.steps is None else 0,
        evaluate_samples=args.held_out,
    )
    out = args.work / args.variant
    if variant.leads and device.type == "cuda":
        compile_kernels(args, recipe, config, out)
        (args.work / f"compiled-{args.variant}").touch()
    pipe = open_pipe(args, device)
    if variant.searched is not None:
        recipe = shared_out(args, pipe, recipe, variant.searched)
    leaders = [f"compiled-{name}" for name in args.variants if VARIANTS[name].leads and device.type == "cuda"]
    wait_for(args, ["ready", *leaders])
    data = Clips(args.work, device)
    judge = ClipJudge(args, pipe, out) if variant.judged else None
    left = args.deadline - time.time() - args.reserve
    begin = time.perf_counter()
    result = finetune(
        pipe,
        recipe,
        data,
        out,
        replace_seconds(config, max(left, 1.0)),
        measure=judge,
        on_step=lambda n: say(args, f"{args.variant}: step {n['step']}, loss {n['loss']:.4f}", n["step"] % 100 == 0),
    )
    seconds = time.perf_counter() - begin
    summary = result.handle.summary()
    if judge is not None:
        judge.generate("trained")
    adapter = sum(file.stat().st_size for file in result.adapter.iterdir())
    report = {
        "variant": asdict(variant),
        "head_densities": getattr(recipe.select, "head_densities", ()),
        "objective": asdict(config.objective),
        "steps": len(result.curves.steps),
        "seconds": seconds,
        # A descending density is a mean over the training, and says nothing of the end.
        "density": None if variant.density_start else summary.density,
        "adapter_bytes": adapter,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "clip_distances": judge.distances if judge is not None else {},
        "evaluations": result.curves.evaluations,
        "losses": [[entry["step"], entry["loss"]] for entry in result.curves.steps[:: args.loss_every]],
    }
    (out / "result.json").write_text(json.dumps(report))
    say(args, f"{args.variant}: {report['steps']} steps in {seconds:.0f} s, {result.curves.evaluations[-1]}")


def shared_out(args: argparse.Namespace, pipe: Any, recipe: Any, density: float) -> Any:
    """The recipe with a density for every head, of this mean, by errors measured on prompts of the training."""
    from dit_accel.calibration.search import search

    size = pixels(args)
    call = {**size, "num_inference_steps": args.denoising_steps, "guidance_scale": 2.0}
    found = search(pipe, SEARCH_PROMPTS, recipe, mean_density=density, generate_kwargs=call)
    say(
        args,
        f"densities per head, mean {found.density:.4f}: predicted velocity error {found.predicted_error:.4f}, "
        f"with one for all {found.predicted_uniform:.4f}",
    )
    return found.recipe


def replace_seconds(config: Any, seconds: float) -> Any:
    """The configuration with a time limit."""
    from dataclasses import replace

    return replace(config, max_seconds=seconds)


def compile_kernels(args: argparse.Namespace, recipe: Any, config: Any, out: Path) -> None:
    """Two steps on noise, on a model of its own: what they compile stays in Triton's cache."""
    from dataclasses import replace

    import torch

    from dit_accel.training.data import capture_call
    from dit_accel.training.finetune import finetune

    pipe = open_pipe(args, torch.device(args.device))
    size = pixels(args)
    captured = capture_call(pipe, {"prompt": "a fish", **size})
    samples = [captured.sample(f"noise-{i}", torch.randn(captured.latents.shape)) for i in range(2 * config.batch_size)]
    short = replace(config, steps=2, evaluate_samples=config.batch_size, evaluate_every=0)
    finetune(pipe, recipe, samples, out / "compile", short)
    say(args, f"{args.variant}: kernels compiled")


class ClipJudge:
    """Generates with the pipeline in training, and compares with the dense model from the same noise.

    Args:
        folder: gets the test clips of the training-free and the trained model.
    """

    def __init__(self, args: argparse.Namespace, pipe: Any, folder: Path) -> None:
        from captions import caption

        self.args, self.pipe, self.folder = args, pipe, folder
        self.prompts = [caption(scene) for scene in test_scenes(args.test_clips)]
        self.distances: dict[int, list[float]] = {}
        self.dense: Any = None

    def __call__(self, step: int) -> dict[str, float]:
        """Mean relative distance of clips to the dense model's before the training."""
        from dit_accel.patches.targets import handle_of

        prompts = self.prompts[:COMPARED_CLIPS]
        if self.dense is None:
            with handle_of(self.pipe).disabled():
                self.dense = self.run(prompts, 0)
            self.generate("training-free")
        clips = self.run(prompts, 0)
        distance = ((clips - self.dense).flatten(1).norm(dim=1) / self.dense.flatten(1).norm(dim=1)).tolist()
        self.distances[step] = distance
        return {"clip_distance": sum(distance) / len(distance)}

    def generate(self, name: str) -> None:
        """Write latents of all test clips, ``NAME.safetensors``."""
        import torch
        from safetensors.torch import save_file

        batches = range(0, len(self.prompts), self.args.clip_batch)
        clips = [self.run(self.prompts[i : i + self.args.clip_batch], i) for i in batches]
        self.folder.mkdir(parents=True, exist_ok=True)
        latents = {"latents": torch.cat(clips).half().cpu()}
        write_aside(self.folder / f"{name}.safetensors", lambda path: save_file(latents, path))

    def run(self, prompts: Sequence[str], first: int) -> Any:
        """Latents of clips; clip i always starts from the same noise."""
        import torch

        args = self.args
        with torch.no_grad():
            return self.pipe(
                list(prompts),
                **pixels(args),
                num_inference_steps=args.denoising_steps,
                guidance_scale=2.0,
                generator=[torch.Generator("cpu").manual_seed(1000 + first + i) for i in range(len(prompts))],
                output_type="latent",
            ).frames.float()


def test_scenes(count: int) -> list[Any]:
    """Held-out scenes of one subject each: what the classifier is asked about."""
    from evaluate import single_scenes

    return single_scenes(count, 11, held_out=True)


def model_dtype(device: Any) -> Any:
    """bfloat16 on a GPU, float32 on a CPU."""
    import torch

    return torch.bfloat16 if device.type == "cuda" else torch.float32


def pixels(args: argparse.Namespace) -> dict[str, int]:
    """The size of a clip, as the pipeline's call names it."""
    height, width = args.size
    return {"height": height, "width": width, "num_frames": args.frames}


def open_pipe(args: argparse.Namespace, device: Any) -> Any:
    """The pipeline that is trained, quiet."""
    from dit_accel.pipelines import load

    pipe = load(args.model, dtype=model_dtype(device), device=device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wait_for(args: argparse.Namespace, names: Sequence[str]) -> None:
    """Until these files are in the working folder.

    Raises:
        TimeoutError: after half of the time.
    """
    limit = args.deadline - args.seconds / 2

    def failed(name: str) -> bool:
        return (args.work / f"{name.removeprefix('compiled-')}.error").exists()

    while missing := [name for name in names if not (args.work / name).exists() and not failed(name)]:
        if (args.work / "failed").exists() or time.time() > limit:
            if names != ["ready"] and (args.work / "ready").exists():
                return  # kernels will be compiled as they come
            raise TimeoutError(f"{', '.join(missing)} did not come.")
        time.sleep(0.2)


def judge(args: argparse.Namespace) -> None:
    """Train a classifier meanwhile; then FVD and accuracy of every set of test clips, as it comes."""
    import torch
    from clip_autoencoder import decode_clip, latent_statistics
    from compose import ClipGeometry, render_clips
    from evaluate import accuracy, shrink, train_classifier
    from safetensors.torch import load_file
    from sprites import SpriteBank, load_sprites

    from dit_accel.quality.frechet import frechet_distance, video_features

    device = torch.device(args.device)
    bank = SpriteBank(load_sprites(args.sprites), device)
    vae = open_pipe(args, device).vae.eval()
    mean, std = latent_statistics(vae, device)
    network = open_i3d(args)
    scenes = test_scenes(args.test_clips)
    labels = [torch.tensor([getattr(s, name) for s in scenes], device=device) for name in ("subject", "motion")]
    wait_for(args, ["ready"])
    begin, end = time.time(), args.deadline - args.reserve - 15
    model, steps = train_classifier(
        bank,
        device,
        lambda: (time.time() - begin) / min(end - begin, args.classify_seconds),
        argparse.Namespace(width=48, batch=args.classify_batch, reuse=4, store=64, frames=args.frames, size=args.size),
    )
    say(args, f"classifier trained for {steps} steps")
    report: dict[str, Any] = {"classifier steps": steps, "test clips": len(scenes)}
    features: dict[str, Any] = {}

    def look(name: str, clips: Iterable[Any]) -> None:
        small, seen = [], []
        for part in clips:
            small.append(shrink(part))
            if network is not None:
                seen.append(video_features(network, part, batch=args.clip_batch))
        found = accuracy(model, torch.cat(small), *labels)
        if network is not None:
            features[name] = torch.cat(seen)
            for other in ("rendered", "dense"):
                if other in features and other != name:
                    found[f"fvd to {other}"] = frechet_distance(features[other], features[name])
        report[name] = found
        write_aside(args.work / "judged.json", lambda path: path.write_text(json.dumps(report)))

    def decoded(file: Path) -> Iterator[Any]:
        for latents in load_file(file, device=str(device))["latents"].float().split(args.clip_batch):
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                clips = decode_clip(vae, latents * std + mean).float().clamp(-1, 1)
            yield clips

    rng, textures = random.Random(9), torch.Generator(device).manual_seed(9)
    geometry = ClipGeometry(args.frames, *args.size)
    parts = [scenes[i : i + args.chunk] for i in range(0, len(scenes), args.chunk)]
    look("rendered", (render_clips(part, bank, geometry, rng, textures)[0] for part in parts))
    main = [name for name in args.variants if VARIANTS[name].judged]
    # The dense model's clips first: the others are compared with them.
    files = {f"{name} {kind}": args.work / name / f"{kind}.safetensors" for name in main for kind in CLIP_SETS}
    if "dense training-free" in files:
        files = {"dense": files.pop("dense training-free"), **files}
    while files:
        for name in [name for name, file in files.items() if file.exists()]:
            look(name, decoded(files.pop(name)))
        if (args.work / "trained").exists() and not any(file.exists() for file in files.values()):
            break
        time.sleep(0.2)
    say(args, f"judged {len(report) - 2} sets of clips")


def open_i3d(args: argparse.Namespace) -> Any:
    """The network of FVD, or None with a line that says why there is none."""
    import torch
    from evaluate import read_i3d

    from dit_accel.quality.measurement import MetricUnavailable

    try:
        network = read_i3d(args.fvd_weights)
        if args.frames < 9:
            raise MetricUnavailable("FVD needs 9 frames.")
        return network.to(torch.device(args.device))
    except (MetricUnavailable, OSError) as error:
        say(args, f"no FVD: {error}")
        return None


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file that others wait for: it is there whole, or not at all."""
    aside = path.with_name(f".{path.name}")
    write(aside)
    aside.rename(path)


def say(args: argparse.Namespace, text: str, wanted: bool = True) -> None:
    """A line with the seconds since the start."""
    if wanted:
        print(f"[{time.time() - args.deadline + args.seconds:5.0f} s] {text}", flush=True)
