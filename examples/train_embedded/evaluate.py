"""Do generated clips show what they should, and how far are they from rendered ones?

`generate` samples held-out prompts with the stock pipeline, or under an adapter, and stores small copies of the clips,
`render` stores rendered clips of the same scenes; with `--fvd-weights` both add I3D's features. `classify` trains a
small 3-D convolutional network on rendered clips to name subject and motion, and reports its accuracy on held-out
rendered clips and on the stored ones. `fvd` compares stored features. `loss` is the flow-matching loss of whole
pipelines on held-out clips, with the same clips, noise and times for each.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from captions import BACKGROUNDS, MOTIONS, SUBJECTS, Scene, caption, sample_scene
from clip_autoencoder import encode_clip, latent_statistics
from compose import ClipGeometry, latent_cover, render_clips
from diffusers import WanPipeline
from model import TEXT_TOKENS, TIME_SHIFT
from sample import generate, load_pipeline, makes_images
from sprites import SpriteBank, load_sprites
from stages import parse_size
from torch import nn

from dit_accel import load_adapter
from dit_accel.quality.frechet import I3d, find_weights, frechet_distance, video_features
from dit_accel.training.adapter_files import read_adapter

SMALL = 64  # pixels of the stored copies
KEPT = 15  # frames, about


def shrink(clips: torch.Tensor) -> torch.Tensor:
    """[n, 3, t, h, w] in [-1, 1] to uint8 [n, 3, about KEPT, SMALL, SMALL]: every second of 29, every fifth of 81."""
    stride = max(1, round(clips.shape[2] / KEPT))
    small = F.adaptive_avg_pool3d(clips[:, :, ::stride].float(), (None, SMALL, SMALL))
    return ((small.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def single_scenes(count: int, seed: int, held_out: bool) -> list[Scene]:
    """Scenes of one subject of normal or big size: what the classifier is asked about."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng, held_out=held_out)
        if scene.count == 1 and scene.size > 0:
            scenes.append(scene)
    return scenes


class Classifier(nn.Module):
    """Frames through 2-D convolutions, then convolutions over time, then two heads."""

    def __init__(self, width: int = 48, second: int = len(MOTIONS)) -> None:
        super().__init__()
        w = width
        self.frames = nn.Sequential(
            nn.Conv2d(5, w, 5, stride=2, padding=2), nn.BatchNorm2d(w), nn.GELU(),
            nn.Conv2d(w, 2 * w, 3, stride=2, padding=1), nn.BatchNorm2d(2 * w), nn.GELU(),
            nn.Conv2d(2 * w, 2 * w, 3, padding=1), nn.BatchNorm2d(2 * w), nn.GELU(),
            nn.Conv2d(2 * w, 4 * w, 3, stride=2, padding=1), nn.BatchNorm2d(4 * w), nn.GELU(),
            nn.Conv2d(4 * w, 4 * w, 3, padding=1), nn.BatchNorm2d(4 * w), nn.GELU(),
        )  # fmt: skip
        self.squeeze = nn.Conv2d(4 * w, w, 1)
        self.time = nn.Sequential(
            nn.Conv1d(64 * w, 4 * w, 3, padding=1),
            nn.GELU(),
            nn.Conv1d(4 * w, 4 * w, 3, padding=1),
            nn.GELU(),
        )
        self.subject = nn.Linear(4 * w, len(SUBJECTS))
        self.second = nn.Linear(8 * w, second)

    def forward(self, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [n, 3, t, SMALL, SMALL] to logits of subject and of motion, or for images of place."""
        n, _, t, h, w = clips.shape
        x = clips.float().div(127.5).sub(1).transpose(1, 2).reshape(n * t, 3, h, w)
        y = torch.linspace(-1, 1, h, device=x.device).view(1, 1, h, 1).expand(n * t, 1, h, w)
        z = torch.linspace(-1, 1, w, device=x.device).view(1, 1, 1, w).expand(n * t, 1, h, w)
        x = self.frames(torch.cat([x, y, z], dim=1))
        pooled = x.amax(dim=(2, 3)).view(n, t, -1).mean(1)
        track = self.time(self.squeeze(x).view(n, t, -1).transpose(1, 2))
        return self.subject(pooled), self.second(torch.cat([track.mean(2), track.amax(2)], dim=1))


def read_i3d(path: Path | None) -> I3d:
    """I3D from the published file, from a half-precision safetensors file of its kernels and biases, or installed."""
    if path is None or path.suffix != ".safetensors":
        return I3d.read(path or find_weights())
    from safetensors.torch import load_file

    # Half the size of the published file, for machines that it would have to be carried to.
    tensors = {name: value.float() for name, value in load_file(path).items()}
    names = {name.rsplit("/", 1)[0] for name in tensors}
    return I3d({name: (tensors[f"{name}/kernel"], tensors[f"{name}/bias"]) for name in names})


def store(args: argparse.Namespace, scenes: list[Scene], make: Callable[[int, list[Scene]], torch.Tensor]) -> None:
    """Makes clips in [-1, 1] of the scenes, a batch at a time, and stores small copies and perhaps features."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = read_i3d(args.fvd_weights).to(device) if args.fvd_weights is not None else None
    small, features = [], []
    began = time.monotonic()
    for i in range(0, args.count, args.batch):
        clips = make(i, scenes[i : i + args.batch])
        small.append(shrink(clips).cpu())
        if network is not None:
            features.append(video_features(network, clips, batch=8))
    print(f"{args.clips}: {args.count} clips in {time.monotonic() - began:.0f} s", flush=True)
    values = {"clips": torch.cat(small).numpy(), "scenes": np.array(json.dumps([asdict(s) for s in scenes]))}
    if features:
        values["features"] = torch.cat(features).numpy()
    # There whole, or not at all: `classify --wait` may be looking for it.
    aside = args.clips.with_name(f"part-{args.clips.name}")
    np.savez_compressed(aside, **values)
    aside.replace(args.clips)


def run_generate(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = load_pipeline(args.pipeline, device)
    steps, guidance = args.steps, args.guidance
    if args.adapter is not None:
        print(load_adapter(pipeline, args.adapter).recipe)
        few = read_adapter(args.adapter).steps
        steps, guidance = (steps, guidance) if few is None else (len(few.sigmas), 1.0)

    def make(first: int, scenes: list[Scene]) -> torch.Tensor:
        prompts = [caption(scene, moving=not makes_images(pipeline)) for scene in scenes]
        out = generate(pipeline, prompts, steps, guidance, args.frames, args.size, 1000 + first)
        return torch.from_numpy(out).permute(0, 4, 1, 2, 3) * 2 - 1

    store(args, single_scenes(args.count, 11, held_out=True), make)


def run_render(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bank = SpriteBank(load_sprites(args.sprites), device)
    rng, textures = random.Random(9), torch.Generator(device).manual_seed(9)
    geometry = ClipGeometry(args.frames, *args.size)
    scenes = single_scenes(args.count, 11, held_out=True)
    store(args, scenes, lambda _, part: render_clips(part, bank, geometry, rng, textures)[0])


def run_fvd(args: argparse.Namespace) -> None:
    report: dict[str, dict[str, float]] = {}
    for rendered in args.rendered:
        real = torch.from_numpy(np.load(rendered)["features"])
        for path in args.clips:
            made = torch.from_numpy(np.load(path)["features"])
            # Few samples bias the distance upwards, so the numbers of clips are part of the result.
            counts = sorted({min(64, len(made)), len(made)})
            found = {f"{n} clips": frechet_distance(real[:n], made[:n]) for n in counts}
            report[f"{path.stem} against {rendered.stem}"] = found
    print(json.dumps(report, indent=1))
    args.report.write_text(json.dumps(report, indent=1))


@torch.no_grad()
def run_loss(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bank = SpriteBank(load_sprites(args.sprites), device)
    geometry = ClipGeometry(args.frames, *args.size)
    report: dict[str, float] = {}
    for folder in args.pipelines:
        pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
        mean, std = latent_statistics(pipeline.vae, device)
        rng, textures = random.Random(21), torch.Generator(device).manual_seed(21)
        noises = torch.Generator("cpu").manual_seed(22)
        total, weights = 0.0, 0.0
        for first in range(0, args.count, args.batch):
            scenes = [sample_scene(rng, held_out=True) for _ in range(min(args.batch, args.count - first))]
            clips, cover = render_clips(scenes, bank, geometry, rng, textures)
            prompts = [caption(scene) for scene in scenes]
            text, _ = pipeline.encode_prompt(
                prompts, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
            )
            where = latent_cover(cover)
            place = (torch.arange(len(scenes)) + first + 0.5) / args.count
            sigma = (TIME_SHIFT * place / (1 + (TIME_SHIFT - 1) * place)).to(device)
            s = sigma.view(-1, 1, 1, 1, 1)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                latents = (encode_clip(pipeline.vae, clips).chunk(2, dim=1)[0].float() - mean) / std
                noise = torch.randn(latents.shape, generator=noises).to(device)
                noisy = (1 - s) * latents + s * noise
                output = pipeline.transformer(noisy, sigma * 1000, text, return_dict=False)[0]
            weight = (1 + 3 * where).expand_as(latents)
            total += float(((output.float() - (noise - latents)).square() * weight).sum())
            weights += float(weight.sum())
        report[str(folder)] = total / weights
    print("flow-matching loss, subjects four times:", json.dumps(report), flush=True)
    args.report.write_text(json.dumps(report, indent=1))


def small_geometry(frames: int, size: tuple[int, int]) -> ClipGeometry:
    """Fewer frames, spread over the same time, and smaller pictures than asked for: as good once they are shrunk."""
    fewer = frames if frames <= 2 * KEPT else len(range(0, frames, round(frames / KEPT)))
    factor = max(1, min(size) // 120)
    return ClipGeometry(fewer, size[0] // factor, size[1] // factor)


def second_label(scene: Scene, frames: int) -> int:
    """What is asked beside the subject: a clip's motion, or an image's place."""
    return scene.motion if frames > 1 else scene.background


def render_small(
    scenes: list[Scene], bank: SpriteBank, geometry: ClipGeometry, rng: random.Random, textures: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rendered small clips with the indices of subject and second label; of one frame images of any moment."""
    moment = rng.random() if geometry.frames == 1 else None
    clips, _ = render_clips(scenes, bank, geometry, rng, textures, moment=moment)
    device = clips.device
    return (
        shrink(clips),
        torch.tensor([s.subject for s in scenes], device=device),
        torch.tensor([second_label(s, geometry.frames) for s in scenes], device=device),
    )


def accuracy(model: Classifier, clips: torch.Tensor, subject: torch.Tensor, second: torch.Tensor) -> dict[str, float]:
    """Shares of clips with the right subject, second label, and both."""
    right_s, right_m = [], []
    with torch.no_grad():
        for c, s, m in zip(clips.split(32), subject.split(32), second.split(32)):
            a, b = model(c)
            right_s.append(a.argmax(1) == s)
            right_m.append(b.argmax(1) == m)
    s, m = torch.cat(right_s), torch.cat(right_m)
    return {
        "subject": s.float().mean().item(),
        "second": m.float().mean().item(),
        "both": (s & m).float().mean().item(),
    }


def train_classifier(
    bank: SpriteBank, device: torch.device, done: Callable[[], float], args: argparse.Namespace
) -> tuple[Classifier, int]:
    """A classifier trained on rendered clips, and its steps.

    Args:
        done: share of the training that is over; at 1 it ends.
        args: ``width``, ``batch``, ``reuse``, ``store``, ``frames`` and ``size`` of the command line.
    """
    rng, textures = random.Random(3), torch.Generator(device).manual_seed(3)
    torch.manual_seed(0)
    geometry = small_geometry(args.frames, args.size)
    model = Classifier(args.width, len(MOTIONS) if args.frames > 1 else len(BACKGROUNDS)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    step = 0
    store: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    while (share := done()) < 1:
        if step % args.reuse == 0 or len(store) < 4:
            scenes = [s for s in (sample_scene(rng) for _ in range(3 * args.batch)) if s.count == 1 and s.size > 0]
            store.append(render_small(scenes[: args.batch], bank, geometry, rng, textures))
            store = store[-args.store :]
        clips, subject, motion = rng.choice(store)
        noisy = clips.float() + 6 * torch.randn_like(clips, dtype=torch.float32)  # generated clips are a bit soft
        if rng.random() < 0.5:
            noisy = F.avg_pool3d(noisy, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False)
        a, b = model(noisy)
        loss = F.cross_entropy(a, subject) + F.cross_entropy(b, motion)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, step / 50 + 0.02, (1 - share) / 0.5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.3f}", flush=True)
    return model.eval(), step


def run_classify(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bank = SpriteBank(load_sprites(args.sprites), device)
    geometry = small_geometry(args.frames, args.size)
    rng, textures = random.Random(4), torch.Generator(device).manual_seed(4)
    start = time.monotonic()
    model, step = train_classifier(bank, device, lambda: (time.monotonic() - start) / args.seconds, args)
    parts = [
        render_small(single_scenes(args.batch, 100 + i, True), bank, geometry, rng, textures)
        for i in range(max(1, args.real // args.batch))
    ]
    real = accuracy(model, *(torch.cat([p[k] for p in parts]) for k in range(3)))
    report: dict[str, object] = {"steps": step, "real": real}
    patience = time.monotonic() + args.wait
    for path in args.clips:
        while not path.exists() and time.monotonic() < patience:
            time.sleep(0.5)
        stored = np.load(path)
        scenes = [Scene(**s) for s in json.loads(str(stored["scenes"]))]
        clips = torch.from_numpy(stored["clips"]).to(device)
        labels = (
            torch.tensor([s.subject for s in scenes], device=device),
            torch.tensor([second_label(s, args.frames) for s in scenes], device=device),
        )
        made = accuracy(model, clips, *labels)
        report[path.stem] = {**made, "of_real": {k: made[k] / max(real[k], 1e-9) for k in made}, "clips": len(scenes)}
    print(json.dumps(report, indent=1))
    args.report.write_text(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("generate")
    make.add_argument("--pipeline", type=Path, default=Path("runs/pipeline"))
    make.add_argument("--steps", type=int, default=16)
    make.add_argument("--guidance", type=float, default=1.0)
    make.add_argument("--adapter", type=Path, help="of a fine-tuning; of few steps: in those, without guidance")
    make.set_defaults(run=run_generate)
    draw = commands.add_parser("render")
    draw.add_argument("--sprites", type=Path, default=Path("data/sprites.zip"))
    draw.set_defaults(run=run_render)
    for command, name in ((make, "generated"), (draw, "rendered")):
        command.add_argument("--clips", type=Path, default=Path(f"runs/{name}.npz"))
        command.add_argument("--count", type=int, default=192)
        command.add_argument("--batch", type=int, default=32)
        command.add_argument("--fvd-weights", type=Path, help="I3D weights: stores features for `fvd`")
    far = commands.add_parser("fvd")
    far.add_argument("--clips", type=Path, nargs="+", required=True)
    far.add_argument("--rendered", type=Path, nargs="+", default=[Path("runs/rendered.npz")])
    far.add_argument("--report", type=Path, default=Path("runs/fvd.json"))
    far.set_defaults(run=run_fvd)
    loss = commands.add_parser("loss")
    loss.add_argument("--pipelines", type=Path, nargs="+", default=[Path("runs/pipeline")])
    loss.add_argument("--sprites", type=Path, default=Path("data/sprites.zip"))
    loss.add_argument("--count", type=int, default=128)
    loss.add_argument("--batch", type=int, default=16)
    loss.add_argument("--report", type=Path, default=Path("runs/loss.json"))
    loss.set_defaults(run=run_loss)
    judge = commands.add_parser("classify")
    judge.add_argument("--sprites", type=Path, default=Path("data/sprites.zip"))
    judge.add_argument("--clips", type=Path, nargs="*", default=[])
    judge.add_argument("--report", type=Path, default=Path("runs/classifier.json"))
    judge.add_argument("--seconds", type=float, default=60)
    judge.add_argument("--wait", type=float, default=0, help="seconds to wait for clips that are still being made")
    judge.add_argument("--batch", type=int, default=64)
    judge.add_argument("--real", type=int, default=256)
    judge.add_argument("--reuse", type=int, default=4, help="steps per newly rendered batch")
    judge.add_argument("--store", type=int, default=64, help="rendered batches kept")
    judge.add_argument("--width", type=int, default=48)
    judge.set_defaults(run=run_classify)
    for command in (make, draw, loss, judge):
        command.add_argument("--frames", type=int, default=29)
        command.add_argument("--size", type=parse_size, default=(192, 192))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
