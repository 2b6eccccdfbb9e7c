"""Noisy batches of a training and of its evaluations, which depend on the seed and a sample's position alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from .config import FinetuneConfig
from .few_steps import Trajectory
from .noise import NoiseProcess
from .noisy import NoisyBatch
from .samples import Sample, collate, spread_over

# Places in the range of noise levels.
EVALUATION_SIGMAS = (0.25, 0.5, 0.75)


class Samples(Protocol):
    """Samples by index, e.g. a :class:`~dit_accel.training.samples.LatentFolder` or a list.

    An index means the same sample every time: a training that goes on checks that it has the same data.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class Batches:
    """Batches of one process of ``processes``, on a device.

    Args:
        data: all samples; the last ``config.evaluate_samples`` are held out where there are twice as many more.
        process: of the noise that the model takes away.
        trajectory: whose levels are drawn in place of the process' own.
        dtype: of noisy latents.
        rank, processes: number of this process, and how many there are.
    """

    def __init__(
        self,
        data: Samples,
        config: FinetuneConfig,
        *,
        process: NoiseProcess,
        trajectory: Trajectory | None,
        dtype: torch.dtype,
        device: torch.device,
        rank: int,
        processes: int,
    ) -> None:
        self.data, self.config, self.process, self.trajectory = data, config, process, trajectory
        self.dtype, self.device, self.rank, self.processes = dtype, device, rank, processes
        self.train_indices, self.held_out = _split(len(data), config.evaluate_samples)

    def training(self, step: int, micro: int, again: int = 0) -> tuple[NoisyBatch, list[str]]:
        """The ``micro``-th of a step's batches, and the names of its samples; ``again`` with other noise."""
        config = self.config
        first = (step * config.accumulation + micro) * self.processes * config.batch_size
        first += self.rank * config.batch_size
        positions = range(first, first + config.batch_size)
        samples = [self.data[self._index(position)] for position in positions]
        seeds = [mix(config.seed, position, 3) for position in positions]
        generators = [torch.Generator().manual_seed(mix(seed, again, 6) if again else seed) for seed in seeds]
        levels = [self._draw(generator) for generator in generators]
        return self._noisy(samples, levels, generators), [sample.name for sample in samples]

    def _draw(self, generator: torch.Generator) -> float:
        if self.trajectory is not None:
            return self.trajectory.draw(generator)
        return self.process.draw(generator, self.config.time_mean, self.config.time_std)

    def evaluation(self) -> Iterator[NoisyBatch]:
        """Held-out samples at every evaluation sigma; the same at every call."""
        for first in range(0, len(self.held_out), self.config.batch_size):
            indices = self.held_out[first : first + self.config.batch_size]
            samples = [self.data[index] for index in indices]
            for number, sigma in enumerate(EVALUATION_SIGMAS):
                seeds = [mix(self.config.seed, index * len(EVALUATION_SIGMAS) + number, 5) for index in indices]
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                low, high = self.process.within
                yield self._noisy(samples, [low + (high - low) * sigma] * len(samples), generators)

    def runs(self) -> Iterator[NoisyBatch]:
        """Held-out samples once each, at full noise, for runs from it; the same at every call."""
        for first in range(0, len(self.held_out), self.config.batch_size):
            indices = self.held_out[first : first + self.config.batch_size]
            generators = [torch.Generator().manual_seed(mix(self.config.seed, index, 7)) for index in indices]
            yield self._noisy([self.data[index] for index in indices], [1.0] * len(indices), generators)

    @property
    def evaluated(self) -> int:
        """Pairs of sample and sigma in an evaluation."""
        return len(self.held_out) * len(EVALUATION_SIGMAS)

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.train_indices))
        generator = torch.Generator().manual_seed(mix(self.config.seed, epoch, 4))
        return self.train_indices[int(torch.randperm(len(self.train_indices), generator=generator)[place])]

    def _noisy(
        self, samples: Sequence[Sample], levels: Sequence[float], generators: Sequence[torch.Generator]
    ) -> NoisyBatch:
        latents, condition = collate(samples, self.device)
        latents = latents.float()
        # Drawn on the CPU, so that a seed means the same on every device.
        noise = torch.cat(
            [torch.randn(s.latents.shape, generator=g) for s, g in zip(samples, generators, strict=True)]
        ).to(self.device)
        level = torch.tensor(levels, dtype=torch.float32, device=self.device)
        scale, parts, noised = samples[0].timestep_scale, samples[0].noised, None
        mixed = self.process.mix(latents, noise, level)
        if parts is not None:
            parts = parts.to(self.device)
            noised = spread_over(parts, latents.shape)
            mixed = torch.where(noised > 0, mixed, latents)

        def timesteps(level: torch.Tensor) -> torch.Tensor:
            timestep = self.process.timestep(level, scale)
            return timestep if parts is None else timestep[:, None] * parts

        has_unconditional = all(sample.unconditional is not None for sample in samples)
        return NoisyBatch(
            latents=mixed.to(self.dtype),
            target=self.process.target(latents, noise, level),
            timestep=timesteps(level),
            condition=condition,
            level=level,
            timesteps=timesteps,
            noised=noised,
            unconditional=collate(samples, self.device, unconditional=True)[1] if has_unconditional else None,
            generators=generators,
        )


def mix(seed: int, number: int, purpose: int) -> int:
    """One seed from three numbers, spread so that neighbours share no stream."""
    value = (seed * 0x9E3779B97F4A7C15 + number * 0xBF58476D1CE4E5B9 + purpose * 0x94D049BB133111EB) % 2**64
    value = ((value ^ (value >> 31)) * 0xD6E8FEB86659FD93) % 2**64
    return (value ^ (value >> 32)) % 2**63


def _split(count: int, held_out: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to evaluate on; a small set serves for both."""
    indices = list(range(count))
    if count > 2 * held_out:
        return indices[:-held_out], indices[-held_out:]
    return indices, indices[:held_out]
