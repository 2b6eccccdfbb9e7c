"""Trains the text encoder and the transformer with flow matching on a pool of encoded clips.

Stages grow the clip: single frames, then 3 latent frames, then all 8, at the final spatial resolution
throughout, so that what a subject looks like is learnt where it is cheap and motion where it has to be.
Each stage has a share of the wall-clock budget. The pool is rendered and encoded on the device and renewed
while training. Under `torchrun --nproc-per-node N` every process draws clips and noise of its own, and the
gradients are averaged; a stage's batch is per process.

Convention of FlowMatchEulerDiscreteScheduler: x = (1 - sigma) * clean + sigma * noise, the model predicts
noise - clean, and its timestep is 1000 * sigma.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from captions import Scene, caption, sample_scene
from checkpoint import (
    flatten_state,
    load_tensors,
    random_state,
    restore_random_state,
    save_json,
    save_tensors,
    unflatten_state,
)
from clip_autoencoder import encode_clip, latent_statistics
from compose import ClipGeometry, latent_cover, render_clips, subject_weight
from concentration import annealed_share, attention_inputs, concentration_penalty, density, tile_masses, tile_tokens
from diffusers import WanTransformer3DModel
from model import (
    CAPTION_TOKENS,
    TEXT_TOKENS,
    TIME_SHIFT,
    build_text_encoder,
    build_transformer,
    encode_words,
    load_autoencoder,
    prompt_embeddings,
    token_ids,
)
from optimizer import Muon
from processes import average_gradients, end_processes, is_first, process_seed, start_processes, together
from sprites import SpriteBank, load_sprites
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import UMT5EncoderModel


@dataclass(frozen=True)
class Stage:
    """A part of the training: `latent_frames` a clip, `batch` size, `capacity` of the pool in clips.

    `renew` a chunk of the pool every so many steps; `share` of the time; `text_tokens` to pad captions to:
    512 as WanPipeline does by default, fewer where the clip is short and padding would cost more than that.
    """

    latent_frames: int
    batch: int
    capacity: int
    renew: int
    share: float
    text_tokens: int = TEXT_TOKENS

    @property
    def frames(self) -> int:
        return 4 * self.latent_frames - 3


def parse_stage(text: str) -> Stage:
    """`latent_frames:batch:capacity:renew:share:text_tokens`, for example `8:48:6000:4:0.6:512`."""
    parts = text.split(":")
    if len(parts) != 6:
        raise argparse.ArgumentTypeError(
            f"a stage is latent_frames:batch:capacity:renew:share:text_tokens, got {text!r}"
        )
    return Stage(int(parts[0]), int(parts[1]), int(parts[2]), int(parts[3]), float(parts[4]), int(parts[5]))


class LatentPool:
    """Encoded clips with their scenes, renewed a chunk at a time.

    `latents` is [capacity, 16, t, h, w], normalised; `cover` [capacity, 1, t, h, w] says where the subjects
    are.
    """

    def __init__(self, trainer: Trainer, stage: Stage, chunk: int) -> None:
        self.trainer, self.stage, self.chunk = trainer, stage, chunk
        _, h, w = trainer.geometry.latent_shape
        capacity = max(chunk, stage.capacity // chunk * chunk)
        store = torch.bfloat16 if trainer.device.type == "cuda" else torch.float32
        self.latents = torch.empty(capacity, 16, stage.latent_frames, h, w, dtype=store, device=trainer.device)
        self.cover = torch.empty(capacity, 1, stage.latent_frames, h, w, dtype=store, device=trainer.device)
        self.scenes: list[Scene] = []
        self.next = 0
        while len(self.scenes) < capacity:
            self.renew()

    @torch.no_grad()
    def renew(self) -> None:
        """Renders and encodes one chunk over the oldest one."""
        t = self.trainer
        scenes = [sample_scene(t.rng) for _ in range(self.chunk)]
        clips, cover = render_clips(scenes, t.bank, t.geometry, t.rng, t.textures, self.stage.frames)
        with torch.autocast(t.device.type, torch.bfloat16, enabled=t.device.type == "cuda"):
            mean = encode_clip(t.vae, clips.contiguous(memory_format=torch.channels_last_3d)).chunk(2, dim=1)[0]
        where = slice(self.next, self.next + self.chunk)
        self.latents[where] = ((mean.float() - t.mean) / t.std).to(self.latents.dtype)
        self.cover[where] = latent_cover(cover).to(self.cover.dtype)
        if len(self.scenes) < self.latents.shape[0]:
            self.scenes.extend(scenes)
        else:
            self.scenes[where] = scenes
        self.next = (self.next + self.chunk) % self.latents.shape[0]

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor, list[Scene]]:
        index = [self.trainer.rng.randrange(len(self.scenes)) for _ in range(size)]
        rows = torch.tensor(index, device=self.latents.device)
        return self.latents[rows].float(), self.cover[rows].float(), [self.scenes[i] for i in index]


class Trainer:
    """Both networks, their averages, optimizers and random numbers: everything a checkpoint holds."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.device = device
        self.geometry = ClipGeometry(args.clip_frames, args.size, args.size)
        torch.manual_seed(args.seed)
        self.transformer = build_transformer(args.layers, args.heads, args.head_dim).to(device)
        self.text_encoder = build_text_encoder().to(device)
        self.vae = load_autoencoder(args.vae, device)
        for parameter in self.vae.parameters():
            if parameter.dim() == 5 and device.type == "cuda":
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        self.mean, self.std = latent_statistics(self.vae, device)
        self.bank = SpriteBank(load_sprites(args.sprites), device)
        seed = process_seed(args.seed)
        self.rng = random.Random(seed)
        self.textures = torch.Generator(device).manual_seed(seed)
        self.noise = torch.Generator(device).manual_seed(seed + 1)
        self.concentration = args.concentration
        self.shares: tuple[float, float] = tuple(args.concentration_shares)
        self.ids = token_ids()
        self.average = {k: v.detach().clone() for k, v in self.named_values().items()}
        matrices, others = [], []
        for name, parameter in self.transformer.named_parameters():
            hidden = name.startswith("blocks.") and parameter.dim() == 2 and args.optimizer == "muon"
            (matrices if hidden else others).append(parameter)
        others += list(self.text_encoder.parameters())
        fused = device.type == "cuda"
        self.rates = {"adamw": args.rate, "muon": args.muon_rate}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(others, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=fused)
        }
        if matrices:
            self.optimizers["muon"] = Muon(matrices, lr=args.muon_rate)
        self.ema = args.ema
        self.step = 0
        # Running mean of each layer's density for 95 % of the attention mass.
        self.densities = torch.full((args.layers,), float("nan"), device=device)
        self.log: list[tuple[int, int, float]] = []

    def named_values(self) -> dict[str, torch.Tensor]:
        """Parameters of both networks, by prefixed name."""
        values = {f"transformer.{k}": v for k, v in self.transformer.named_parameters()}
        values.update({f"text_encoder.{k}": v for k, v in self.text_encoder.named_parameters()})
        return values

    def caption_ids(self, scenes: list[Scene]) -> torch.Tensor:
        rows = []
        for scene in scenes:
            # One caption in ten is dropped for guidance; a few words are unknown, so that unknown words do
            # no harm.
            text = "" if self.rng.random() < 0.1 else caption(scene, self.rng)
            row = encode_words(text, self.ids)
            if len(row) > 1 and self.rng.random() < 0.05:
                row.insert(self.rng.randrange(len(row)), self.ids["<unk>"])
            rows.append((row + [0] * CAPTION_TOKENS)[:CAPTION_TOKENS])
        return torch.tensor(rows).to(self.device, non_blocking=True)

    def train_step(self, pool: LatentPool, factor: float, share: float, image: bool = False) -> torch.Tensor:
        """One step; `image` trains on first frames alone, which the causal encoder keeps separate.

        `share` of the key tiles is what the concentration penalty leaves a head.
        """
        clean, cover, scenes = pool.batch(pool.stage.batch)
        if image:
            clean, cover = clean[:, :, :1], cover[:, :, :1]
        ids = self.caption_ids(scenes)
        n = clean.shape[0]
        # Stratified draws: one in every n-th part of the unit interval, then the scheduler's shift.
        uniform = (torch.arange(n, device=self.device) + torch.rand(n, generator=self.noise, device=self.device)) / n
        sigma = TIME_SHIFT * uniform / (1 + (TIME_SHIFT - 1) * uniform)
        noise = torch.randn(clean.shape, generator=self.noise, device=self.device)
        s = sigma.view(-1, 1, 1, 1, 1)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.rates[name] * factor
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            text = prompt_embeddings(self.text_encoder, ids, pool.stage.text_tokens)
            output = self.transformer((1 - s) * clean + s * noise, sigma * 1000, text, return_dict=False)[0]
        error = (output.float() - (noise - clean)).square()
        loss = (error * subject_weight(cover, 3, 8)).mean()
        loss.backward()
        if self.concentration > 0 and not image and pool.stage.latent_frames % 4 == 0:
            self.concentrate((1 - s) * clean + s * noise, sigma * 1000, text.detach(), share)
        average_gradients([*self.transformer.parameters(), *self.text_encoder.parameters()])
        torch.nn.utils.clip_grad_norm_([*self.transformer.parameters(), *self.text_encoder.parameters()], 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.named_values().values()), 1 - decay)
        return loss.detach()

    def concentrate(
        self, noisy: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, share: float, samples: int = 3
    ) -> None:
        """Adds the gradient of the concentration penalty of every layer, on a few samples and query tiles."""
        some = torch.randperm(len(noisy), generator=self.noise, device=self.device)[:samples]
        grid = (noisy.shape[2], noisy.shape[3], noisy.shape[4])
        count = grid[0] * grid[1] * grid[2] // 64
        tiles = torch.tensor(self.rng.sample(range(count), min(8, count)), device=self.device)
        order = tile_tokens(grid, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            for layer, (query, key) in enumerate(
                attention_inputs(self.transformer, noisy[some], timestep[some], text[some])
            ):
                masses = tile_masses(query, key, order, tiles)
                (self.concentration * concentration_penalty(masses, share)).backward()
                found = density(masses.detach())
                self.densities[layer] = torch.where(
                    self.densities[layer].isnan(), found, 0.98 * self.densities[layer] + 0.02 * found
                )

    def save(self, folder: Path) -> None:
        """A checkpoint to resume from exactly, given the same stage."""
        tensors = {f"average.{k}": v for k, v in self.average.items()}
        tensors.update({f"model.{k}": v for k, v in self.named_values().items()})
        rest = {}
        for name, optimizer in self.optimizers.items():
            state, rest[name] = flatten_state(optimizer.state_dict(), name)
            tensors.update(state)
        save_tensors(tensors, folder, "state")
        state_of_chance = random_state(self.rng, {"textures": self.textures, "noise": self.noise})
        save_json(
            folder / "state.json",
            {"step": self.step, "log": self.log, "optimizers": rest, "random": state_of_chance},
        )

    def load(self, folder: Path) -> None:
        tensors = load_tensors(folder, "state")
        meta = json.loads((folder / "state.json").read_text())
        self.load_values({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        self.average = {k[8:]: v.to(self.device) for k, v in tensors.items() if k.startswith("average.")}
        self.average = {k: self.average[k] for k in self.named_values()}
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(unflatten_state(tensors, meta["optimizers"][name], name))
        restore_random_state(meta["random"], self.rng, {"textures": self.textures, "noise": self.noise})
        self.step, self.log = meta["step"], [tuple(row) for row in meta["log"]]

    def load_values(self, values: dict[str, torch.Tensor]) -> None:
        """Puts weights in place, by the names of `named_values`."""
        with torch.no_grad():
            for name, parameter in self.named_values().items():
                parameter.copy_(values[name])

    def warm_start(self, folder: Path) -> None:
        """Starts from averaged weights or a saved pipeline; optimizers begin anew."""
        if (folder / "model_index.json").is_file():
            released = {
                "transformer": WanTransformer3DModel.from_pretrained(folder / "transformer"),
                "text_encoder": UMT5EncoderModel.from_pretrained(folder / "text_encoder"),
            }
            values = {f"{part}.{k}": v for part, net in released.items() for k, v in net.named_parameters()}
        else:
            values = load_tensors(folder, "ema")
            meta = json.loads((folder / "log.json").read_text())
            self.step, self.log = meta["step"], [tuple(row) for row in meta["log"]]
        self.load_values(values)
        self.average = {k: v.detach().clone() for k, v in self.named_values().items()}

    def save_average(self, folder: Path) -> None:
        save_tensors(self.average, folder, "ema")
        save_json(folder / "log.json", {"step": self.step, "log": self.log})


def schedule(done: float, warmup: float) -> float:
    """Learning-rate factor: linear warm-up, flat, linear to zero over the last 45 %."""
    return min(1.0, done / warmup + 0.02, max(0.0, (1 - done) / 0.45))


def attention_backend(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """cuDNN attention on the GPU when it runs there, else PyTorch's choice."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(order, set_priority=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sprites", type=Path, default=Path("data/sprites.zip"))
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/vae"))
    parser.add_argument("--out", type=Path, default=Path("runs/transformer"))
    parser.add_argument("--resume", type=Path, help="checkpoint folder: go on exactly")
    parser.add_argument("--warm-start", type=Path, help="folder with ema-*.safetensors, or a pipeline: new optimizers")
    parser.add_argument("--seconds", type=float, default=540, help="wall-clock budget, pools and compilation included")
    parser.add_argument("--max-steps", type=int, default=10**9, help="stop after so many steps a stage")
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
    parser.add_argument("--schedule-start", type=float, default=0.0, help="where in the schedule this run begins")
    parser.add_argument("--schedule-end", type=float, default=1.0, help="where in the schedule this run ends")
    parser.add_argument("--warmup", type=float, default=0.02)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--muon-rate", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--clip-frames", type=int, default=29)
    parser.add_argument("--chunk", type=int, default=64, help="clips rendered and encoded at once")
    parser.add_argument("--image-every", type=int, default=8, help="every so many steps train on first frames alone")
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
    args = parser.parse_args()

    start = time.monotonic()
    device = start_processes()
    first = is_first()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    trainer = Trainer(args, device)
    if args.resume:
        trainer.load(args.resume)
    elif args.warm_start:
        trainer.warm_start(args.warm_start)
    if not args.no_compile and device.type == "cuda":
        for block in trainer.transformer.blocks:
            block.compile(dynamic=False)
    args.out.mkdir(parents=True, exist_ok=True)

    total = sum(stage.share for stage in args.stages)
    spent = 0.0
    saved = start
    with attention_backend(device):
        for stage in args.stages:
            spent += stage.share / total
            deadline = spent * args.seconds
            opened = time.monotonic()
            chunk = args.chunk * max(1, 4 // stage.latent_frames)
            pool = LatentPool(trainer, stage, min(chunk, stage.capacity))
            if device.type == "cuda":
                torch.cuda.synchronize()
            if first:
                print(f"stage {stage}: pool in {time.monotonic() - opened:.1f} s", flush=True)
            steps, running, ticked = 0, [], time.monotonic()
            while steps < args.max_steps:
                # Asking the clock of the first process waits for the device, so not at every step.
                if steps % 16 == 0:
                    elapsed = together(time.monotonic() - start, device)
                if elapsed >= deadline:
                    break
                done = steps / args.max_steps if args.max_steps < 10**9 else elapsed / args.seconds
                place = args.schedule_start + (args.schedule_end - args.schedule_start) * done
                # New optimizers need a short warm-up of their own.
                ramp = min(1.0, (trainer.step + 1) / 100 if not args.warm_start else (steps + 1) / 60)
                image = args.image_every > 0 and steps % args.image_every == args.image_every - 1
                share = annealed_share(*trainer.shares, done)
                loss = trainer.train_step(pool, ramp * schedule(place, args.warmup), share, image)
                if not image:
                    running.append(loss)
                steps += 1
                if steps % stage.renew == 0:
                    pool.renew()
                if steps % 25 == 0:
                    average = torch.stack(running).mean().item()
                    running = []
                    trainer.log.append((trainer.step, stage.latent_frames, average))
                    if steps % 100 == 0 and first:
                        rate = (time.monotonic() - ticked) / 100
                        ticked = time.monotonic()
                        print(
                            f"step {trainer.step} frames {stage.latent_frames} "
                            f"loss {average:.4f} {1000 * rate:.0f} ms/step, share {share:.3f}, density "
                            + " ".join(f"{x:.2f}" for x in trainer.densities.tolist()),
                            flush=True,
                        )
                    if first and time.monotonic() - saved > args.save_every:
                        trainer.save_average(args.out)
                        saved = time.monotonic()
            peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
            print(
                f"stage {stage.latent_frames}: {steps} steps, memory {peak:.1f} GiB",
                flush=True,
            )
            del pool
    if first:
        trainer.save_average(args.out)
        if args.checkpoint:
            trainer.save(args.out / "checkpoint")
    end_processes()


if __name__ == "__main__":
    main()
