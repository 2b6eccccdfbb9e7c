"""Does a classifier that was trained on real (rendered) clips recognise what the generated ones should show?

`generate` samples held-out prompts with the stock pipeline and stores small copies of the clips; `classify`
trains a small 3-D convolutional network on rendered clips to name subject and motion, and reports its
accuracy on held-out rendered clips and on the generated ones.
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
from captions import MOTIONS, SUBJECTS, Scene, caption, sample_scene
from compose import ClipGeometry, render_clips
from diffusers import WanPipeline
from sample import generate
from sprites import SpriteBank, load_sprites
from torch import nn

SMALL = 64  # pixels of the stored copies
STRIDE = 2  # every second frame


def shrink(clips: torch.Tensor) -> torch.Tensor:
    """[n, 3, t, h, w] in [-1, 1] to uint8 [n, 3, ceil(t / 2), SMALL, SMALL]."""
    small = F.adaptive_avg_pool3d(clips[:, :, ::STRIDE].float(), (None, SMALL, SMALL))
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

    def __init__(self, width: int = 48) -> None:
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
        self.motion = nn.Linear(8 * w, len(MOTIONS))

    def forward(self, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [n, 3, t, SMALL, SMALL] to logits of subject and motion."""
        n, _, t, h, w = clips.shape
        x = clips.float().div(127.5).sub(1).transpose(1, 2).reshape(n * t, 3, h, w)
        y = torch.linspace(-1, 1, h, device=x.device).view(1, 1, h, 1).expand(n * t, 1, h, w)
        z = torch.linspace(-1, 1, w, device=x.device).view(1, 1, 1, w).expand(n * t, 1, h, w)
        x = self.frames(torch.cat([x, y, z], dim=1))
        pooled = x.amax(dim=(2, 3)).view(n, t, -1).mean(1)
        track = self.time(self.squeeze(x).view(n, t, -1).transpose(1, 2))
        return self.subject(pooled), self.motion(torch.cat([track.mean(2), track.amax(2)], dim=1))


def run_generate(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = WanPipeline.from_pretrained(args.pipeline, torch_dtype=torch.bfloat16).to(device)
    pipeline.set_progress_bar_config(disable=True)
    scenes = single_scenes(args.count, 11, held_out=True)
    clips = []
    began = time.monotonic()
    for i in range(0, args.count, args.batch):
        prompts = [caption(scene) for scene in scenes[i : i + args.batch]]
        out = generate(pipeline, prompts, args.steps, args.guidance, 29, 192, 1000 + i)
        clips.append(shrink(torch.from_numpy(out).permute(0, 4, 1, 2, 3) * 2 - 1))
    print(f"{args.count} clips in {time.monotonic() - began:.0f} s")
    np.savez_compressed(args.clips, clips=torch.cat(clips).numpy(), scenes=json.dumps([asdict(s) for s in scenes]))


def render_small(
    scenes: list[Scene], bank: SpriteBank, size: int, rng: random.Random, textures: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rendered small clips with the indices of subject and motion."""
    clips, _ = render_clips(scenes, bank, ClipGeometry(29, size, size), rng, textures)
    device = clips.device
    return (
        shrink(clips),
        torch.tensor([s.subject for s in scenes], device=device),
        torch.tensor([s.motion for s in scenes], device=device),
    )


def accuracy(model: Classifier, clips: torch.Tensor, subject: torch.Tensor, motion: torch.Tensor) -> dict[str, float]:
    """Shares of clips with the right subject, motion, and both."""
    right_s, right_m = [], []
    with torch.no_grad():
        for c, s, m in zip(clips.split(32), subject.split(32), motion.split(32)):
            a, b = model(c)
            right_s.append(a.argmax(1) == s)
            right_m.append(b.argmax(1) == m)
    s, m = torch.cat(right_s), torch.cat(right_m)
    return {
        "subject": s.float().mean().item(),
        "motion": m.float().mean().item(),
        "both": (s & m).float().mean().item(),
    }


def train_classifier(
    bank: SpriteBank, device: torch.device, done: Callable[[], float], args: argparse.Namespace
) -> tuple[Classifier, int]:
    """A classifier trained on rendered clips, and its steps.

    Args:
        done: share of the training that is over; at 1 it ends.
        args: ``width``, ``batch``, ``reuse``, ``store`` and ``render_size`` of the command line.
    """
    rng, textures = random.Random(3), torch.Generator(device).manual_seed(3)
    torch.manual_seed(0)
    model = Classifier(args.width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    step = 0
    store: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    while (share := done()) < 1:
        if step % args.reuse == 0 or len(store) < 4:
            scenes = [s for s in (sample_scene(rng) for _ in range(3 * args.batch)) if s.count == 1 and s.size > 0]
            store.append(render_small(scenes[: args.batch], bank, args.render_size, rng, textures))
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
    rng, textures = random.Random(4), torch.Generator(device).manual_seed(4)
    start = time.monotonic()
    model, step = train_classifier(bank, device, lambda: (time.monotonic() - start) / args.seconds, args)
    parts = [
        render_small(single_scenes(args.batch, 100 + i, True), bank, args.render_size, rng, textures)
        for i in range(max(1, args.real // args.batch))
    ]
    real = accuracy(model, *(torch.cat([p[k] for p in parts]) for k in range(3)))
    report: dict[str, object] = {"steps": step, "real": real}
    for path in args.clips:
        stored = np.load(path)
        scenes = [Scene(**s) for s in json.loads(str(stored["scenes"]))]
        clips = torch.from_numpy(stored["clips"]).to(device)
        labels = (
            torch.tensor([s.subject for s in scenes], device=device),
            torch.tensor([s.motion for s in scenes], device=device),
        )
        made = accuracy(model, clips, *labels)
        report[path.stem] = {**made, "of_real": {k: made[k] / real[k] for k in made}, "clips": len(scenes)}
    print(json.dumps(report, indent=1))
    args.report.write_text(json.dumps(report, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("generate")
    make.add_argument("--pipeline", type=Path, default=Path("runs/pipeline"))
    make.add_argument("--clips", type=Path, default=Path("runs/generated.npz"))
    make.add_argument("--count", type=int, default=192)
    make.add_argument("--batch", type=int, default=32)
    make.add_argument("--steps", type=int, default=16)
    make.add_argument("--guidance", type=float, default=1.0)
    make.set_defaults(run=run_generate)
    judge = commands.add_parser("classify")
    judge.add_argument("--sprites", type=Path, default=Path("data/sprites.zip"))
    judge.add_argument("--clips", type=Path, nargs="*", default=[])
    judge.add_argument("--report", type=Path, default=Path("runs/classifier.json"))
    judge.add_argument("--seconds", type=float, default=60)
    judge.add_argument("--batch", type=int, default=64)
    judge.add_argument("--real", type=int, default=256)
    judge.add_argument("--reuse", type=int, default=4, help="steps per newly rendered batch")
    judge.add_argument("--store", type=int, default=64, help="rendered batches kept")
    judge.add_argument("--width", type=int, default=48)
    judge.add_argument("--render-size", type=int, default=192)
    judge.set_defaults(run=run_classify)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
