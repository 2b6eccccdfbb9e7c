"""A fine-tuned model beside its dense self: the same samples, noise and sigmas, with and without the patch."""

from __future__ import annotations

import math
from typing import Any

import torch

from .batches import Batches
from .few_steps import FewSteps, Trajectory, denoise
from .noisy import NoisyBatch, guided, mean_square, velocity
from .trainables import Trainables


class Evaluation:
    """Of a model against its dense self; what the dense model gives is computed once, where weights can be taken back.

    Args:
        model: as the training calls it.
        trainables: know the dense teacher.
        batches: of the samples that are kept for this.
        trajectory, steps: where the model learns few steps; else None.
        guidance: of the teacher's runs.
        sharded: whether the weights are in shards, which cannot be taken back.
    """

    def __init__(
        self,
        model: Any,
        trainables: Trainables,
        batches: Batches,
        *,
        trajectory: Trajectory | None,
        steps: FewSteps | None,
        guidance: float,
        sharded: bool,
    ) -> None:
        self._model, self._trainables, self._batches = model, trainables, batches
        self._trajectory, self._steps, self._guidance = trajectory, steps, guidance
        self._sharded = sharded
        self._dense_velocities: dict[int, torch.Tensor] = {}
        self._dense_runs: dict[int, torch.Tensor] = {}

    def numbers(self) -> dict[str, float]:
        """Relative error of the velocity, losses of flow matching, and where few steps are learned the distance of
        clips made in them."""
        numbers = self._against_dense()
        if self._trajectory is not None:
            numbers["few_step_distance"] = self._against_teacher(self._trajectory)
        return numbers

    def _against_dense(self) -> dict[str, float]:
        error = norm = flow = dense_flow = 0.0
        for number, batch in enumerate(self._batches.evaluation()):
            got, wanted = velocity(self._model, batch), self._dense_velocity(number, batch)
            error += float((got - wanted).square().sum())
            norm += float(wanted.square().sum())
            flow += float(mean_square(got, batch.target, batch.noised)) * len(got)
            dense_flow += float(mean_square(wanted, batch.target, batch.noised)) * len(got)
        count = self._batches.evaluated
        return {
            "velocity_error": math.sqrt(error / norm) if norm else math.nan,
            "flow_loss": flow / count,
            "dense_flow_loss": dense_flow / count,
        }

    def _against_teacher(self, trajectory: Trajectory) -> float:
        """Relative distance of clips made in few steps to those of the teacher's whole run from the same noise.

        Distribution matching does not ask for the same clip: there it need not fall to nothing.
        """
        error = norm = 0.0
        steps = self._steps
        assert steps is not None
        for number, batch in enumerate(self._batches.runs()):
            noise = batch.noise()
            if number not in self._dense_runs:
                with self._trainables.dense_teacher(frozen=True):
                    told = lambda x, level, b=batch: guided(self._model, b.at(x, level), self._guidance)  # noqa: E731
                    self._dense_runs[number] = denoise(told, noise, trajectory.levels[:-1]).cpu()
            wanted = self._dense_runs[number].to(noise.device)
            told = lambda x, level, b=batch: velocity(self._model, b.at(x, level))  # noqa: E731
            got = denoise(told, noise, steps.sigmas, batch.noise if steps.renoise else None)
            error += float((got - wanted).square().sum())
            norm += float(wanted.square().sum())
        return math.sqrt(error / norm) if norm else math.nan

    def _dense_velocity(self, number: int, batch: NoisyBatch) -> torch.Tensor:
        """Of the dense model before the training, which is computed once; of the present one where shards
        cannot be taken back."""
        if self._sharded:
            with self._trainables.dense_teacher(frozen=False):
                return velocity(self._model, batch)
        if number not in self._dense_velocities:
            with self._trainables.dense_teacher(frozen=True):
                self._dense_velocities[number] = velocity(self._model, batch).cpu()
        return self._dense_velocities[number].to(batch.target.device)
