"""One training step after another, and everything that a checkpoint holds.

Convention of FlowMatchEulerDiscreteScheduler: x = (1 - sigma) * clean + sigma * noise, the model predicts
noise - clean, and its timestep is 1000 * sigma.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from checkpoint import (
    flatten_state,
    load_tensors,
    random_state,
    restore_random_state,
    save_json,
    save_tensors,
    unflatten_state,
)
from compose import subject_weight
from image_task import ImageTask
from optimizer import Muon
from pool import Encoder, LatentPool
from processes import average_gradients, process_seed
from stages import Stage
from video_task import VideoTask
from warm_start import fitted_all

LOG = "log.json"
# What `export.py` builds the networks from.
BUILT = ("task", "layers", "single_layers", "heads", "head_dim", "patch", "time_shift")


class Trainer:
    """The networks of a task, their averages, optimizers and random numbers: everything a checkpoint holds."""

    def __init__(self, args: argparse.Namespace, task: VideoTask | ImageTask, encode: Encoder) -> None:
        self.task, self.encode, self.device = task, encode, encode.device
        self.seed = process_seed(args.seed)
        self.rng = random.Random(self.seed)
        self.noise = torch.Generator(self.device).manual_seed(self.seed + 1)
        self.shift, self.ema, self.concentration = args.time_shift, args.ema, args.concentration
        self.average = {k: v.detach().clone() for k, v in self.named_values().items()}
        matrices, others = [], []
        for name, parameter in self.named_values().items():
            hidden = name.startswith("transformer.") and "blocks." in name and parameter.dim() == 2
            (matrices if hidden and args.optimizer == "muon" else others).append(parameter)
        fused = self.device.type == "cuda"
        self.rates = {"adamw": args.rate, "muon": args.muon_rate}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(others, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=fused)
        }
        if matrices:
            self.optimizers["muon"] = Muon(matrices, lr=args.muon_rate)
        self.step = 0
        self.planned = 0  # steps of the present plan
        self.made: dict[int, int] = {}  # chunks that each stage's pool has made
        self.running: list[torch.Tensor | float] = []  # losses that the log does not have yet
        self.log: list[tuple[int, int, float]] = []

    def named_values(self) -> dict[str, torch.nn.Parameter]:
        """Parameters of all networks, by prefixed name."""
        return {f"{part}.{k}": v for part, net in self.task.networks.items() for k, v in net.named_parameters()}

    def pool(self, stage: Stage, index: int, chunk: int) -> LatentPool:
        """The pool of a stage, as it was when the plan left it."""
        shape = stage.geometry(1, self.task.args.size).latent_shape
        seed = f"{self.seed}/{index}"
        return LatentPool(self.task.render, self.encode, stage, shape, chunk, seed, self.made.get(index, 0))

    def train_step(self, pool: LatentPool, factor: float, share: float) -> torch.Tensor:
        """One step at `factor` of the learning rates.

        `share` of the key tiles is what the concentration penalty leaves a head.
        """
        batch = self.task.prepare(pool.batch(pool.stage.batch, self.rng), self.rng, self.planned)
        words = self.task.words(batch, self.rng)
        clean = batch.clean
        n = clean.shape[0]
        # Stratified draws: one in every n-th part of the unit interval, then the scheduler's shift.
        uniform = (torch.arange(n, device=self.device) + torch.rand(n, generator=self.noise, device=self.device)) / n
        sigma = self.shift * uniform / (1 + (self.shift - 1) * uniform)
        noise = torch.randn(clean.shape, generator=self.noise, device=self.device)
        s = sigma.view(-1, 1, 1, 1, 1)
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = self.rates[name] * factor
        noisy = (1 - s) * clean + s * noise
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            output = self.task.velocity(noisy, sigma, words, batch.reference, pool.stage.text_tokens)
        error = (output.float() - (noise - clean)).square()
        loss = (error * subject_weight(batch.cover, 3, 8)).mean()
        loss.backward()
        if self.concentration > 0 and isinstance(self.task, VideoTask) and clean.shape[2] % 4 == 0:
            self.task.concentrate(noisy, sigma, words, pool.stage, share, self.rng, self.noise)
        parameters = list(self.named_values().values())
        average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.planned += 1
        decay = min(self.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), parameters, 1 - decay)
        return loss.detach()

    def save(self, folder: Path) -> None:
        """A checkpoint to resume from exactly, given the same plan."""
        tensors = {f"average.{k}": v for k, v in self.average.items()}
        tensors.update({f"model.{k}": v for k, v in self.named_values().items()})
        rest = {}
        for name, optimizer in self.optimizers.items():
            state, rest[name] = flatten_state(optimizer.state_dict(), name)
            tensors.update(state)
        save_tensors(tensors, folder, "state")
        save_json(
            folder / "state.json",
            {
                "step": self.step,
                "planned": self.planned,
                "made": self.made,
                "running": [float(loss) for loss in self.running],
                "log": self.log,
                "optimizers": rest,
                "random": random_state(self.rng, {"noise": self.noise}),
            },
        )

    def load(self, folder: Path) -> None:
        """Goes on from what `save` wrote."""
        tensors = load_tensors(folder, "state")
        meta = json.loads((folder / "state.json").read_text())
        self.load_values({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        self.average = {k: tensors[f"average.{k}"].to(self.device) for k in self.named_values()}
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(unflatten_state(tensors, meta["optimizers"][name], name))
        restore_random_state(meta["random"], self.rng, {"noise": self.noise})
        self.step, self.planned, self.running = meta["step"], meta["planned"], meta["running"]
        self.made = {int(index): made for index, made in meta["made"].items()}
        self.log = [tuple(row) for row in meta["log"]]

    def load_values(self, values: dict[str, torch.Tensor]) -> None:
        """Puts weights in place, by the names of `named_values`."""
        with torch.no_grad():
            for name, parameter in self.named_values().items():
                parameter.copy_(values[name])

    def warm_start(self, folder: Path, fresh_attention: bool = False) -> None:
        """Starts from averaged weights, or from what fits of a saved pipeline; optimizers begin anew."""
        own = self.named_values()
        if (folder / "model_index.json").is_file():
            released = {part: kind.from_pretrained(folder / name) for part, (name, kind) in self.task.parts.items()}
            values = {f"{part}.{k}": v for part, net in released.items() for k, v in net.named_parameters()}
        else:
            values = load_tensors(folder, "ema")
            meta = json.loads((folder / LOG).read_text())
            self.step, self.log = meta["step"], [tuple(row) for row in meta["log"]]
        self.load_values(fitted_all(values, own, fresh_attention))
        self.average = {k: v.detach().clone() for k, v in own.items()}

    def save_average(self, folder: Path) -> None:
        save_tensors(self.average, folder, "ema")
        args = vars(self.task.args)
        built = {name: args[name] for name in BUILT}
        save_json(folder / LOG, {"step": self.step, "planned": self.planned, "log": self.log, "built": built})
