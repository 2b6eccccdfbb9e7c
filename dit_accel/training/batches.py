"""Noisy batches of a training and of its evaluations, which depend on the seed and a sample's position alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from .config import FinetuneConfig
from .objective import NoisyBatch, draw_sigma
from .samples import Sample, collate

# Places in the range of sigmas.
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
        sigmas: lowest and highest noise level.
        shift: of the noise levels that are drawn.
        dtype: of noisy latents.
        process: number of this process.
    """

    def __init__(
        self,
        data: Samples,
        config: FinetuneConfig,
        *,
        sigmas: tuple[float, float],
        shift: float,
        dtype: torch.dtype,
        device: torch.device,
        process: int,
        processes: int,
    ) -> None:
        self.data, self.config, self.sigmas, self.shift = data, config, sigmas, shift
        self.dtype, self.device, self.process, self.processes = dtype, device, process, processes
        self.train_indices, self.held_out = _split(len(data), config.evaluate_samples)

    def training(self, step: int, micro: int) -> tuple[NoisyBatch, list[str]]:
        """The ``micro``-th of a step's batches, and the names of its samples."""
        config = self.config
        first = (step * config.accumulation + micro) * self.processes * config.batch_size
        first += self.process * config.batch_size
        positions = range(first, first + config.batch_size)
        samples = [self.data[self._index(position)] for position in positions]
        generators = [torch.Generator().manual_seed(mix(config.seed, position, 3)) for position in positions]
        sigmas = [draw_sigma(g, config.time_mean, config.time_std, self.shift, self.sigmas) for g in generators]
        return self._noisy(samples, sigmas, generators), [sample.name for sample in samples]

    def evaluation(self) -> Iterator[NoisyBatch]:
        """Held-out samples at every evaluation sigma; the same at every call."""
        for first in range(0, len(self.held_out), self.config.batch_size):
            indices = self.held_out[first : first + self.config.batch_size]
            samples = [self.data[index] for index in indices]
            for number, sigma in enumerate(EVALUATION_SIGMAS):
                seeds = [mix(self.config.seed, index * len(EVALUATION_SIGMAS) + number, 5) for index in indices]
                generators = [torch.Generator().manual_seed(seed) for seed in seeds]
                low, high = self.sigmas
                yield self._noisy(samples, [low + (high - low) * sigma] * len(samples), generators)

    @property
    def evaluated(self) -> int:
        """Pairs of sample and sigma in an evaluation."""
        return len(self.held_out) * len(EVALUATION_SIGMAS)

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self.train_indices))
        generator = torch.Generator().manual_seed(mix(self.config.seed, epoch, 4))
        return self.train_indices[int(torch.randperm(len(self.train_indices), generator=generator)[place])]

    def _noisy(
        self, samples: Sequence[Sample], sigmas: Sequence[float], generators: Sequence[torch.Generator]
    ) -> NoisyBatch:
        latents, condition = collate(samples, self.device)
        latents = latents.float()
        # Drawn on the CPU, so that a seed means the same on every device.
        noise = torch.cat(
            [torch.randn(s.latents.shape, generator=g) for s, g in zip(samples, generators, strict=True)]
        ).to(self.device)
        sigma = torch.tensor(sigmas, dtype=torch.float32, device=self.device)
        wide = sigma.view(-1, *[1] * (latents.dim() - 1))
        return NoisyBatch(
            latents=((1 - wide) * latents + wide * noise).to(self.dtype),
            target=noise - latents,
            timestep=sigma * samples[0].timestep_scale,
            condition=condition,
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
