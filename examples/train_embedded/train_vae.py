"""Trains the small `AutoencoderKLWan` on rendered clips; ends by measuring the latents' mean and spread.

Loss: L1 + L1 of gradients at four scales + L1 of frame differences + a little KL, subjects weighted. Crops
first, whole clips last. Under `torchrun --nproc-per-node N` every process draws clips of its own, and the
gradients are averaged; the batch is per process. With `--warm-start` it goes on from trained weights, and
`--anchor` keeps the latents near theirs, so that a transformer trained on those need not begin anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from captions import MOTION_NAMES, sample_scene
from checkpoint import (
    flatten_state,
    load_tensors,
    random_state,
    restore_random_state,
    save_json,
    save_tensors,
    unflatten_state,
)
from clip_autoencoder import build_autoencoder, decode_clip, encode_clip, latent_statistics
from compose import ClipGeometry, render_clips, subject_weight
from diffusers import AutoencoderKLWan
from optimizer import Muon
from PIL import Image
from processes import average_gradients, end_processes, is_first, process_seed, start_processes, together
from sprites import SpriteBank, load_sprites

REUSE = 3  # steps that crop the same rendered clips; checkpoints belong on a multiple of it


def reconstruction_loss(
    output: torch.Tensor, target: torch.Tensor, cover: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """L1 with edges at four scales and motion, each weighted to subjects. Returns (loss, plain L1)."""
    weight = subject_weight(cover, 2, 10)
    error = output - target
    plain = error.abs().mean()
    loss = (error.abs() * weight).mean()
    if error.shape[2] > 1:
        loss = loss + 0.5 * ((error[:, :, 1:] - error[:, :, :-1]).abs() * weight[:, :, 1:]).mean()
    for _ in range(4):
        loss = loss + 0.5 * ((error[..., 1:] - error[..., :-1]).abs() * weight[..., 1:]).mean()
        loss = loss + 0.5 * ((error[..., 1:, :] - error[..., :-1, :]).abs() * weight[..., 1:, :]).mean()
        error, weight = F.avg_pool3d(error, (1, 2, 2)), F.avg_pool3d(weight, (1, 2, 2))
        loss = loss + 0.25 * (error.abs() * weight).mean()
    return loss, plain


def random_crops(
    clips: torch.Tensor, cover: torch.Tensor, size: int, frames: int, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """One common crop of `size` pixels and `frames` frames for the whole batch."""
    t0 = rng.randrange(clips.shape[2] - frames + 1)
    y0 = rng.randrange((clips.shape[3] - size) // 8 + 1) * 8
    x0 = rng.randrange((clips.shape[4] - size) // 8 + 1) * 8
    window = (..., slice(t0, t0 + frames), slice(y0, y0 + size), slice(x0, x0 + size))
    return clips[window], cover[window]


class Trainer:
    """The autoencoder, its optimizer, its average and its random numbers: everything a checkpoint holds."""

    def __init__(
        self,
        sprites: Path,
        geometry: ClipGeometry,
        device: torch.device,
        compile_: bool,
        seed: int,
        warm_start: Path | None = None,
        anchor: float = 0.0,
    ) -> None:
        self.device, self.geometry = device, geometry
        torch.manual_seed(seed)
        self.vae = build_autoencoder().to(device).train()
        self.anchor = anchor
        self.first: AutoencoderKLWan | None = None
        if warm_start is not None:
            trained = AutoencoderKLWan.from_pretrained(warm_start, torch_dtype=torch.float32)
            self.vae.load_state_dict(trained.state_dict())
            if anchor > 0:
                _, self.spread = latent_statistics(trained, device)
        for parameter in self.vae.parameters():
            if parameter.dim() == 5:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
        if warm_start is not None and anchor > 0:
            self.first = copy.deepcopy(self.vae).eval().requires_grad_(False)
        self.average = {k: v.detach().clone() for k, v in self.vae.state_dict().items()}
        seed = process_seed(seed)
        self.rng = random.Random(seed)
        self.textures = torch.Generator(device).manual_seed(seed)
        self.noise = torch.Generator(device).manual_seed(seed + 1)
        self.bank = SpriteBank(load_sprites(sprites), device)
        kernels, others = [], []
        for name, parameter in self.vae.named_parameters():
            inner = parameter.dim() >= 4 and min(parameter.shape[0], parameter[0].numel()) >= 32
            edge = "conv_in" in name or "conv_out" in name or "quant" in name
            (kernels if inner and not edge else others).append(parameter)
        fused = device.type == "cuda"
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "muon": Muon(kernels, lr=1e-3),
            "adamw": torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=fused),
        }
        self.step = 0
        self.rendered: tuple[torch.Tensor, torch.Tensor] | None = None
        self.log: list[tuple[int, float, float]] = []
        self._run = torch.compile(self._forward, dynamic=False) if compile_ else self._forward

    def _forward(
        self, clips: torch.Tensor, cover: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            mean, log_variance = encode_clip(self.vae, clips).chunk(2, dim=1)
            mean, log_variance = mean.float(), log_variance.float().clamp(-30, 20)
            latents = mean + (0.5 * log_variance).exp() * noise
            output = decode_clip(self.vae, latents).float()
            kept = None if self.first is None else encode_clip(self.first, clips).chunk(2, dim=1)[0].float()
        loss, plain = reconstruction_loss(output, clips, cover)
        if kept is not None:
            loss = loss + self.anchor * ((mean - kept) / self.spread).square().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return loss + 1e-4 * kl, plain

    def train_step(self, batch: int, crop: int, frames: int, rates: dict[str, float]) -> None:
        if self.step % REUSE == 0 or self.rendered is None:
            scenes = [sample_scene(self.rng) for _ in range(batch)]
            self.rendered = render_clips(scenes, self.bank, self.geometry, self.rng, self.textures)
        clips, cover = random_crops(*self.rendered, crop, frames, self.rng)
        clips = clips.contiguous(memory_format=torch.channels_last_3d)
        shape = (clips.shape[0], 16, (frames - 1) // 4 + 1, crop // 8, crop // 8)
        noise = torch.randn(shape, generator=self.noise, device=self.device)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name]
        loss, plain = self._run(clips, cover, noise)
        loss.backward()
        average_gradients(list(self.vae.parameters()))
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(0.995, self.step / (self.step + 20))
        with torch.no_grad():
            values = list(self.vae.state_dict().values())
            torch._foreach_lerp_(list(self.average.values()), values, 1 - decay)
        if self.step % 10 == 0:
            self.log.append((self.step, loss.item(), plain.item()))

    def averaged(self) -> AutoencoderKLWan:
        """A copy that holds the averaged weights."""
        copy = build_autoencoder().to(self.device).eval()
        copy.load_state_dict(self.average)
        return copy

    def save(self, folder: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        rest = {}
        for name, optimizer in self.optimizers.items():
            state_tensors, rest[name] = flatten_state(optimizer.state_dict(), name)
            tensors.update(state_tensors)
        tensors.update({f"model.{k}": v for k, v in self.vae.state_dict().items()})
        tensors.update({f"average.{k}": v for k, v in self.average.items()})
        save_tensors(tensors, folder, "vae")
        state = random_state(self.rng, {"textures": self.textures, "noise": self.noise})
        save_json(folder / "vae.json", {"step": self.step, "log": self.log, "optimizers": rest, "random": state})

    def load(self, folder: Path) -> None:
        tensors = load_tensors(folder, "vae")
        meta = json.loads((folder / "vae.json").read_text())
        self.vae.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        self.average = {k[8:]: v.to(self.device) for k, v in tensors.items() if k.startswith("average.")}
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(unflatten_state(tensors, meta["optimizers"][name], name))
        restore_random_state(meta["random"], self.rng, {"textures": self.textures, "noise": self.noise})
        self.step, self.log = meta["step"], [tuple(row) for row in meta["log"]]


@torch.no_grad()
def measure_statistics(vae: AutoencoderKLWan, trainer: Trainer, batches: int, batch: int) -> dict[str, float]:
    """Writes latents_mean and latents_std into the config; returns PSNR in dB of whole held-out clips.

    `subject_psnr_db` is over the subjects alone, `worst_frame_db` over the subject in the worst frame of a clip,
    mean over the clips: what dissolves between two latent frames shows there.
    """
    # The same clips whatever was drawn before, so that two autoencoders can be compared.
    rng, textures = random.Random(31), torch.Generator(trainer.device).manual_seed(31)
    means, worst = [], []
    error, subject, covered = 0.0, 0.0, 0.0
    for _ in range(batches):
        scenes = [sample_scene(rng, held_out=True) for _ in range(batch)]
        clips, cover = render_clips(scenes, trainer.bank, trainer.geometry, rng, textures)
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.device.type == "cuda"):
            mean = encode_clip(vae, clips).chunk(2, dim=1)[0]
            output = decode_clip(vae, mean)
        squares = (output.float().clamp(-1, 1) - clips).square().mean(1, keepdim=True)
        error += float(squares.mean()) / batches
        subject, covered = subject + float((squares * cover).sum()), covered + float(cover.sum())
        by_frame = (squares * cover).sum((1, 3, 4)) / cover.sum((1, 3, 4)).clamp_min(1)
        worst.append(10 * (4 / by_frame.amax(1).clamp_min(1e-6)).log10())
        means.append(mean.float().transpose(0, 1).flatten(1))
    latents = torch.cat(means, dim=1)
    vae.register_to_config(
        latents_mean=[round(float(x), 5) for x in latents.mean(1)],
        latents_std=[round(float(x), 5) for x in latents.std(1)],
    )
    return {
        "psnr_db": 10 * math.log10(4 / error),
        "subject_psnr_db": 10 * math.log10(4 * covered / subject),
        "worst_frame_db": torch.cat(worst).mean().item(),
        "mse": error,
    }


@torch.no_grad()
def draw_reconstructions(vae: AutoencoderKLWan, trainer: Trainer, out: Path) -> None:
    """Original above stock reconstruction, consecutive frames of six held-out clips: the quick motions first."""
    wanted = [MOTION_NAMES.index(name) for name in ("bounce", "bounce", "circle", "closer", "left", "up")]
    rng = random.Random(5)
    scenes = [next(s for s in iter(lambda: sample_scene(rng, held_out=True), None) if s.motion == m) for m in wanted]
    clips, _ = render_clips(scenes, trainer.bank, trainer.geometry, trainer.rng, trainer.textures)
    decoded = vae.decode(vae.encode(clips).latent_dist.mode()).sample
    frames = slice(clips.shape[2] // 4, clips.shape[2] // 4 + 10)
    rows = [x[:, frames].permute(0, 2, 1, 3).flatten(2) for pair in zip(clips, decoded) for x in pair]
    picture = ((torch.cat(rows, 1).clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(picture).save(out, quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sprites", type=Path, default=Path("data/sprites.zip"))
    parser.add_argument("--out", type=Path, default=Path("runs/vae"))
    parser.add_argument("--resume", type=Path, help="folder with a checkpoint to go on from")
    parser.add_argument("--warm-start", type=Path, help="folder of a trained autoencoder: new optimizers")
    parser.add_argument("--anchor", type=float, default=0.0, help="weight of the latents' distance to its latents")
    parser.add_argument("--seconds", type=float, default=170, help="wall-clock budget for the steps")
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--crop", type=int, default=96)
    parser.add_argument("--frames", type=int, default=29, help="frames of a crop")
    parser.add_argument("--whole-from", type=float, default=0.85, help="when whole frames take over from crops")
    parser.add_argument("--rate", type=float, default=2e-3, help="of AdamW: norms, biases, first and last layers")
    parser.add_argument("--muon-rate", type=float, default=2e-3, help="of Muon: the convolution kernels")
    parser.add_argument("--size", type=int, default=192, help="clip height and width in pixels")
    parser.add_argument("--clip-frames", type=int, default=29)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--checkpoint", action="store_true", help="also write a resumable checkpoint at the end")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    device = start_processes()
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    geometry = ClipGeometry(args.clip_frames, args.size, args.size)
    compiled = not args.no_compile and device.type == "cuda"
    trainer = Trainer(args.sprites, geometry, device, compiled, args.seed, args.warm_start, args.anchor)
    if args.resume:
        trainer.load(args.resume)

    first = is_first()
    start = time.monotonic()
    last = start
    target = trainer.step + args.max_steps
    elapsed = 0.0
    # As many pixels a step as the crops have.
    whole_batch = max(1, round(args.batch * (args.crop / args.size) ** 2))
    while trainer.step < target:
        # Asking the clock of the first process waits for the device, so not at every step.
        if trainer.step % 8 == 0:
            elapsed = together(time.monotonic() - start, device)
        if elapsed >= args.seconds:
            break
        # Progress by time, since the budget is time: warm up over 3 %, then cosine to a twentieth.
        done = max(elapsed / args.seconds, trainer.step / target)
        factor = min(1.0, done / 0.03 + 0.05) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))
        rates = {"muon": args.muon_rate * factor, "adamw": args.rate * factor}
        if done < args.whole_from:
            trainer.train_step(args.batch, args.crop, args.frames, rates)
        else:
            if trainer.rendered is not None and trainer.rendered[0].shape[0] != whole_batch:
                trainer.rendered = None
            trainer.train_step(whole_batch, args.size, args.clip_frames, rates)
        if trainer.step % 50 == 0 and first:
            now = time.monotonic()
            _, loss, plain = trainer.log[-1]
            print(
                f"step {trainer.step} loss {loss:.4f} l1 {plain:.4f} {1000 * (now - last) / 50:.0f} ms/step",
                flush=True,
            )
            last = now

    trainer.rendered = None
    end_processes()
    if not first:
        return
    vae = trainer.averaged()
    result = measure_statistics(vae, trainer, 8 if device.type == "cuda" else 1, min(args.batch, 16))
    result["steps"] = trainer.step
    if device.type == "cuda":
        result["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print("result", json.dumps(result), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    draw_reconstructions(vae, trainer, args.out / "reconstructions.webp")
    vae.to(torch.bfloat16).save_pretrained(args.out / "vae")
    save_json(args.out / "vae_log.json", {"log": trainer.log, "result": result})
    if args.checkpoint:
        trainer.save(args.out / "checkpoint")


if __name__ == "__main__":
    main()
