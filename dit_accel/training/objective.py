"""What a fine-tuning minimises, and how its terms are computed on one model, without a second copy of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F

from ..patches.handle import PatchHandle
from .gate import gate_losses
from .noisy import NoisyBatch, mean_square, velocity

FEW_STEP_TERMS = ("consistency", "dmd")


@dataclass(frozen=True)
class Objective:
    """Weights of the terms of the loss.

    Attributes:
        flow: the model's own: squared error of the prediction; of flow matching against noise minus data.
        velocity: distillation: squared error against the prediction of the dense model, the same weights with
            the patch switched off.
        outputs: squared error of attention outputs, before the output projection, against those of the
            dense model, mean over layers (CLEAR, arXiv 2412.16112).
        align: SmoothL1 between sparse and full attention of the same layer inputs, each in turn held fixed,
            mean over layers (SSA, arXiv 2511.20102).
        gate: divergence of a learned selection's softmax from the exact block mass of the dense model, mean over
            layers (SeerAttention, arXiv 2410.13276). It reaches the gates alone.
        consistency: to few steps: squared error against where the dense model's run leads, see
            :func:`~dit_accel.training.consistency.consistency_loss`.
        dmd: to few steps: matching of the dense model's distribution, see
            :func:`~dit_accel.training.distribution_matching.distribution_loss`.
        full_stream: probability that a step goes on with the full outputs instead of the sparse ones (SSA).
    """

    flow: float = 1.0
    velocity: float = 0.0
    outputs: float = 0.0
    align: float = 0.0
    gate: float = 0.0
    consistency: float = 0.0
    dmd: float = 0.0
    full_stream: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 0.0 or (field.name == "full_stream" and value > 1.0):
                raise ValueError(
                    f"objective.{field.name} must not be negative, nor a probability above 1, got {value}."
                )
        weights = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "full_stream"}
        named = [name for name, weight in weights.items() if weight]
        if not named:
            raise ValueError("The objective needs at least one term with a weight above 0.")
        if self.gate and len(named) > 1:
            raise ValueError("objective.gate goes alone: it trains gates on the dense model, which the others change.")
        alone = next((name for name in FEW_STEP_TERMS if name in named and len(named) > 1), None)
        if alone is not None:
            raise ValueError(
                f"objective.{alone} goes alone: it trains a model of few steps, the others one of many; got "
                f"{', '.join(named)}."
            )
        if self.full_stream and not self.align:
            raise ValueError(
                f"objective.full_stream = {self.full_stream} without align would train the dense model alone."
            )

    @property
    def needs_teacher(self) -> bool:
        """Whether the dense model runs too."""
        return bool(self.velocity or self.outputs or self.is_few_step)

    @property
    def is_few_step(self) -> bool:
        """Whether the model is distilled to few steps."""
        return bool(self.consistency or self.dmd)


OBJECTIVES: dict[str, Objective] = {
    "flow": Objective(),
    "distill": Objective(flow=0.0, velocity=1.0),
    "clear": Objective(flow=1.0, velocity=0.5, outputs=0.5),
    # The paper's 10 goes with a language model's loss; here it outweighs flow matching, and the loss rises.
    "ssa": Objective(flow=1.0, align=0.1, full_stream=0.5),
    "gate": Objective(flow=0.0, gate=1.0),
    "consistency": Objective(flow=0.0, consistency=1.0),
    "dmd": Objective(flow=0.0, dmd=1.0),
}
"""By name: plain flow matching, velocity distillation (SpargeAttention2, TurboDiffusion), CLEAR's, SSA's,
SeerAttention's, and to few steps phased consistency and distribution matching."""


def objective_for(recipe_name: str) -> str:
    """The objective that a recipe's authors train it with."""
    return {"sparge2": "distill", "clear": "clear", "ssa": "ssa", "seer": "gate"}.get(recipe_name, "flow")


@dataclass(frozen=True, eq=False)
class Losses:
    """The weighted sum, and each term unweighted and detached, by name."""

    total: torch.Tensor
    terms: dict[str, torch.Tensor]


Teacher = Callable[[], AbstractContextManager[None]]


@contextmanager
def losses(
    model: Callable[..., Any],
    handle: PatchHandle,
    objective: Objective,
    batch: NoisyBatch,
    teacher: Teacher,
    full_stream: bool = False,
    few_step_loss: Callable[[NoisyBatch], torch.Tensor] | None = None,
) -> Iterator[Losses]:
    """The losses of a batch. Run the backward inside the context: checkpointed layers are repeated in it.

    Args:
        model: the patched transformer, possibly wrapped for several devices.
        handle: of its patch.
        teacher: context in which ``model`` is the dense teacher.
        full_stream: go on with full attention's outputs in this batch.
        few_step_loss: of an objective to few steps, its one term.
    """
    if few_step_loss is not None:
        term, value = ("dmd" if objective.dmd else "consistency"), few_step_loss(batch)
        yield Losses(getattr(objective, term) * value, {term: value.detach()})
        return
    if objective.gate:
        with gate_losses(handle) as found:
            velocity(model, batch)
        mean = torch.stack([torch.stack(of_layer).mean() for of_layer in found.values()]).mean()
        yield Losses(objective.gate * mean, {"gate": mean.detach()})
        return
    taught = _Outputs()
    with torch.no_grad(), teacher():
        if objective.outputs:
            with handle.tap_outputs(taught):
                wanted = velocity(model, batch)
        elif objective.velocity:
            wanted = velocity(model, batch)
    tap = _tap(objective, taught, full_stream)
    with _tapped(handle, tap):
        predicted = velocity(model, batch)
        terms: dict[str, torch.Tensor] = {}
        if objective.flow:
            terms["flow"] = mean_square(predicted, batch.target, batch.noised)
        if objective.velocity:
            terms["velocity"] = mean_square(predicted, wanted, batch.noised)
        if tap is not None and tap.found:
            mean = torch.stack([torch.stack(terms) for terms in tap.found.values()]).mean(0)
            named = [name for name in ("outputs", "align") if getattr(objective, name)]
            terms |= dict(zip(named, mean, strict=True))
        total = torch.stack([getattr(objective, name) * value for name, value in terms.items()]).sum()
        yield Losses(total, {name: value.detach() for name, value in terms.items()})


class _Outputs:
    """Keeps the attention outputs of the teacher, by layer."""

    def __init__(self) -> None:
        self.by_layer: dict[int, torch.Tensor] = {}

    def __call__(self, layer: int, output: torch.Tensor, _dense: Callable[[], torch.Tensor] | None) -> torch.Tensor:
        self.by_layer[layer] = output.detach()
        return output


class _LayerLosses:
    """Losses on the attention outputs of the student.

    A checkpointed layer comes here again when its forward is repeated; it must compute the same then, but its
    loss has been taken.
    """

    def __init__(self, objective: Objective, taught: _Outputs, full_stream: bool) -> None:
        self.objective = objective
        self.taught = taught
        self.full_stream = full_stream
        self.found: dict[int, list[torch.Tensor]] = {}

    def __call__(self, layer: int, output: torch.Tensor, dense: Callable[[], torch.Tensor] | None) -> torch.Tensor:
        if dense is None:
            return output  # a layer that is dense anyway has nothing to learn
        terms, used = [], output
        if self.objective.outputs:
            terms.append(F.mse_loss(output.float(), self.taught.by_layer[layer].float()))
        if self.objective.align:
            full, sparse = dense(), output
            used = full if self.full_stream else sparse
            full, sparse = full.float(), sparse.float()
            terms.append(F.smooth_l1_loss(full, sparse.detach()) + F.smooth_l1_loss(sparse, full.detach()))
        self.found.setdefault(layer, terms)
        return used


def _tap(objective: Objective, taught: _Outputs, full_stream: bool) -> _LayerLosses | None:
    if not objective.outputs and not objective.align:
        return None
    return _LayerLosses(objective, taught, full_stream)


@contextmanager
def _tapped(handle: PatchHandle, tap: _LayerLosses | None) -> Iterator[None]:
    if tap is None:
        yield
        return
    with handle.tap_outputs(tap):
        yield


def annealed_density(start: float, target: float, step: int, steps: int) -> float:
    """Density at a step of a linear descent from ``start`` to ``target`` over ``steps`` steps."""
    if step >= steps:
        return target
    share = step / steps
    return start + (target - start) * share
