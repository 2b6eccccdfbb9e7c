"""Trains a text encoder and a transformer with flow matching on a pool of encoded clips or images.

Stages grow what is shown: single frames, then short clips, then whole ones; or small pictures, then large ones. What a
subject looks like is learnt where it is cheap, motion and detail where they have to be. Each stage has a share of the
plan: of the wall-clock budget, or of `--steps`. A run of steps may be broken off and resumed, to the bit on a CPU. The
pool is rendered and encoded on the device and renewed while training. Under `torchrun --nproc-per-node N` every process
draws clips and noise of its own, and the gradients are averaged; a stage's batch is per process.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from concentration import annealed_share
from image_task import ImageTask
from model import TIME_SHIFT, load_autoencoder
from pool import Encoder, LatentPool
from processes import end_processes, is_first, start_processes, together
from sprites import SpriteBank, load_sprites
from stages import Stage, ends, parse_stage
from torch.nn.attention import SDPBackend, sdpa_kernel
from trainer import Trainer
from video_task import VideoTask

TASKS = {"video": VideoTask, "image": ImageTask}
LOGGED = 25  # steps that one row of the log is the mean of


def schedule(done: float, warmup: float) -> float:
    """Learning-rate factor: linear warm-up, flat, linear to zero over the last 45 %."""
    return min(1.0, done / warmup + 0.02, max(0.0, (1 - done) / 0.45))


def attention_backend(device: torch.device, task: str) -> contextlib.AbstractContextManager[object]:
    """cuDNN attention for clips on the GPU when it runs there, else PyTorch's choice."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    order = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if task == "video":
        # Training images (128 of 1,088 or 2,112 tokens, compiled blocks, torch 2.11) ended in an illegal memory access.
        order.insert(0, SDPBackend.CUDNN_ATTENTION)
    return sdpa_kernel(order, set_priority=True)


class Plan:
    """How far a run is along its stages, by the clock or by steps, and whether this piece of it is over."""

    def __init__(self, args: argparse.Namespace, trainer: Trainer, start: float) -> None:
        self.args, self.trainer, self.start = args, trainer, start
        self.ends = ends(args.stages, args.steps)
        self.elapsed = 0.0

    def look(self) -> None:
        """Reads the clock of the first process, which waits for the device, so not at every step."""
        self.elapsed = together(time.monotonic() - self.start, self.trainer.device)

    @property
    def done(self) -> float:
        """The share of the plan that is done."""
        by_clock = self.elapsed / self.args.seconds
        return by_clock if self.args.steps is None else self.trainer.planned / self.args.steps

    @property
    def piece_over(self) -> bool:
        """Whether to stop here, and perhaps to go on from the checkpoint later."""
        stop = self.args.stop_at
        return self.elapsed >= self.args.seconds or (stop is not None and self.trainer.planned >= stop)

    def factor(self) -> float:
        """Of the learning rates, at the next step."""
        place = self.args.schedule_start + (self.args.schedule_end - self.args.schedule_start) * self.done
        # New optimizers need a short warm-up of their own.
        steps = self.trainer.planned + 1
        ramp = steps / 60 if self.args.warm_start else (self.trainer.step + 1) / 100
        return min(1.0, ramp) * schedule(place, self.args.warmup)


def train_stage(trainer: Trainer, plan: Plan, index: int, pool: LatentPool, save: Callable[[], None]) -> int:
    """Trains until the stage or the piece is over; the number of steps."""
    stage, steps, ticked = pool.stage, 0, time.monotonic()
    while True:
        if steps % 16 == 0:
            plan.look()
        if plan.piece_over or plan.done >= plan.ends[index]:
            return steps
        share = annealed_share(*plan.args.concentration_shares, plan.done)
        loss = trainer.train_step(pool, plan.factor(), share)
        trainer.running.append(loss)
        steps += 1
        if trainer.planned % stage.renew == 0:
            pool.renew()
        trainer.made[index] = pool.made
        if trainer.planned % LOGGED == 0:
            average = torch.stack([torch.as_tensor(x, device=loss.device) for x in trainer.running]).mean().item()
            trainer.running = []
            trainer.log.append((trainer.step, stage.latent_frames, average))
            if trainer.planned % (4 * LOGGED) == 0 and is_first():
                rate = (time.monotonic() - ticked) / min(steps, 4 * LOGGED)
                ticked = time.monotonic()
                print(
                    f"step {trainer.step} frames {stage.latent_frames} loss {average:.4f} {1000 * rate:.0f} ms/step",
                    flush=True,
                )
            if is_first():
                save()


def train(trainer: Trainer, args: argparse.Namespace, start: float) -> bool:
    """Runs the stages of a plan that are not over; whether the plan has ended."""
    plan = Plan(args, trainer, start)
    saved = [time.monotonic()]

    def save() -> None:
        if time.monotonic() - saved[0] > args.save_every:
            trainer.save_average(args.out)
            saved[0] = time.monotonic()

    for index, stage in enumerate(args.stages):
        plan.look()
        if plan.piece_over:
            break
        if plan.done >= plan.ends[index]:
            continue
        opened = time.monotonic()
        pool = trainer.pool(stage, index, stage.chunk(args.chunk, args.size))
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        if is_first():
            print(f"stage {stage}: pool in {time.monotonic() - opened:.1f} s", flush=True)
        steps = train_stage(trainer, plan, index, pool, save)
        peak = torch.cuda.max_memory_allocated() / 2**30 if trainer.device.type == "cuda" else 0.0
        print(f"stage {stage.latent_frames}: {steps} steps, memory {peak:.1f} GiB", flush=True)
        del pool
    return plan.done >= 1


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=tuple(TASKS), default="video")
    parser.add_argument("--sprites", type=Path, default=Path("data/sprites.zip"))
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/vae"))
    parser.add_argument("--out", type=Path, default=Path("runs/transformer"))
    parser.add_argument("--resume", type=Path, help="checkpoint folder: go on exactly, with the same plan")
    parser.add_argument("--warm-start", type=Path, help="folder with ema-*.safetensors, or a pipeline: new optimizers")
    parser.add_argument(
        "--fresh-attention",
        action="store_true",
        help="with --warm-start: queries and keys of the self-attentions start from nothing",
    )
    parser.add_argument("--seconds", type=float, default=540, help="wall-clock budget, pools and compilation included")
    parser.add_argument("--steps", type=int, help="plan so many steps; --seconds then only ends this piece of them")
    parser.add_argument("--stop-at", type=int, help="with --steps: end this piece there")
    parser.add_argument(
        "--stages",
        type=parse_stage,
        nargs="+",
        default=[
            Stage(1, 256, 12288, 8, 0.1, 64),
            Stage(3, 128, 6144, 6, 0.3, 64),
            Stage(8, 48, 4096, 8, 0.6),
        ],
    )
    parser.add_argument("--schedule-start", type=float, default=0.0, help="where in the schedule this plan begins")
    parser.add_argument("--schedule-end", type=float, default=1.0, help="where in the schedule this plan ends")
    parser.add_argument("--warmup", type=float, default=0.02)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--muon-rate", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--time-shift", type=float, default=TIME_SHIFT, help="of sigmas; more for larger pictures")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--single-layers", type=int, default=6, help="of an image model: behind its layers")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64, help="of a video model; an image model's are 128")
    parser.add_argument("--patch", type=int, default=1, help="latents of a video model's token, in height and width")
    parser.add_argument("--size", type=int, default=192, help="height and width of stages that name none")
    parser.add_argument("--clip-frames", type=int, default=29)
    parser.add_argument(
        "--chunk",
        type=int,
        default=64,
        help="clips of 29 frames of 192 x 192 rendered and encoded at once, or as many pixels",
    )
    parser.add_argument("--image-every", type=int, default=8, help="every so many steps train on first frames alone")
    parser.add_argument("--edit-share", type=float, default=0.5, help="of an image model's steps that edit a reference")
    parser.add_argument("--concentration", type=float, default=0.06, help="weight of the penalty of concentration.py")
    parser.add_argument(
        "--concentration-shares",
        type=float,
        nargs=2,
        default=(0.3, 0.09),
        metavar=("FIRST", "LAST"),
        help="share of the key tiles that is to hold 95 %% of the attention mass, at first and at last",
    )
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--checkpoint", action="store_true", help="also write a resumable checkpoint")
    parser.add_argument("--save-every", type=float, default=90, help="seconds between saves of the averaged weights")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    if args.stop_at is not None and args.steps is None:
        parser.error("--stop-at needs a plan of --steps")
    if args.concentration > 0 and args.patch > 1:
        parser.error(f"--concentration looks at tiles of single latents, got --patch {args.patch}; give it as 0")
    return args


def build_trainer(args: argparse.Namespace, device: torch.device) -> Trainer:
    """The trainer of a command line, at the start of its run."""
    torch.manual_seed(args.seed)
    bank = SpriteBank(load_sprites(args.sprites), device)
    trainer = Trainer(args, TASKS[args.task](args, bank, device), Encoder(load_autoencoder(args.vae, device), device))
    if args.resume:
        trainer.load(args.resume)
    elif args.warm_start:
        trainer.warm_start(args.warm_start, args.fresh_attention)
    return trainer


def main() -> None:
    args = read_arguments()
    start = time.monotonic()
    device = start_processes()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    trainer = build_trainer(args, device)
    if not args.no_compile and device.type == "cuda":
        for block in trainer.task.blocks:
            block.compile(dynamic=False)
    args.out.mkdir(parents=True, exist_ok=True)
    with attention_backend(device, args.task):
        ended = train(trainer, args, start)
    if is_first():
        print(
            f"{'the plan has ended' if ended else 'a piece of the plan has ended'} at step {trainer.step}", flush=True
        )
        trainer.save_average(args.out)
        if args.checkpoint:
            trainer.save(args.out / "checkpoint")
    end_processes()


if __name__ == "__main__":
    main()
