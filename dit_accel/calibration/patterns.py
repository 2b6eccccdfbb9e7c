"""A static pattern for every head, from errors measured on the model itself (MoA, DuoAttention)."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import nn

from .. import presets
from ..api import patch
from ..call import AttentionCall
from ..engine import Engine
from ..parts import Parts
from ..patches.targets import transformers_of
from ..recipe import Recipe
from ..stages.compensate.carried import Carried
from ..stages.select.head_rules import RULES, HeadRules, check_rule
from .carried_steps import carried_steps
from .hull import Point, lower_hull, slope
from .progress import Progress
from .recording import first_of_steps, record_inputs, spread_steps
from .runs import asked_of, begin, run_arguments


@dataclass(frozen=True, eq=False)
class RuleErrors:
    """What each rule leaves of each head's output.

    Attributes:
        rules: that were measured.
        kept: float64 ``[layers, heads, rules]``: share of the block pairs that is read.
        error: float64 ``[layers, heads, rules]``: mean squared error of the head's output against dense, as a share of
            the whole layer's squared output.
    """

    rules: tuple[str, ...]
    kept: torch.Tensor
    error: torch.Tensor


@dataclass(frozen=True, eq=False)
class FoundRules:
    """What :func:`search_rules` found.

    Attributes:
        recipe: with a rule per layer and head.
        errors: what was measured; further targets need only :func:`allocate_rules`.
        density: mean share of the blocks that it keeps.
        error: mean relative error of a layer's output, root of the mean square.
        best_single: the rule of the least error that keeps no more, for all heads alike; None if none does.
        error_single: its error.
    """

    recipe: Recipe
    errors: RuleErrors
    density: float
    error: float
    best_single: str | None
    error_single: float | None


@torch.no_grad()
def measure_rules(
    model: nn.Module,
    recipe: Recipe,
    inputs: Sequence[dict[str, Any]],
    rules: Sequence[str] = RULES,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    parts: Parts | None = None,
    shares: Sequence[float | None] | None = None,
) -> RuleErrors:
    """Measure every rule on every head, each on the dense model's queries and keys: one forward an input.

    With ``shares`` it keeps a tensor like the output for each layer and rule.

    Args:
        model: a transformer, not patched.
        recipe: whose order, blocks and precision are used; its selection, compensation and schedule are left out.
        inputs: keyword arguments of forwards along the trajectory.
        rules: see :class:`~dit_accel.stages.select.head_rules.HeadRules`.
        progress: told forwards done and their number.
        parts: where what each input gave is kept, in a folder that was claimed for these very inputs: those that are
            there are not measured again. None keeps none.
        shares: for each input None where it is of a dense step, which is not measured, or the share that is added of
            what a rule leaves out of the last such input; None: nothing is added.
    """
    plain = recipe.with_fields({"schedule": "schedule", "compensate": "none"})
    added = [0.0] * len(inputs) if shares is None else list(shares)
    with patch(model, "dense") as handle:
        (session,) = handle.sessions.values()
        names = [record.name for record in session.engine.records]
        engines = [Engine(_with_rules(plain, ((rule,),)), names, "auto", 0) for rule in rules]
        tap = _MeasuringTap(session.engine, engines)
        with handle.tap_outputs(tap):
            for done, (arguments, share) in enumerate(zip(inputs, added, strict=True)):
                part = f"input-{done:03d}"
                kept = None if parts is None else parts.read(part)
                if kept is None:
                    tap.share = share
                    model(**arguments)
                    if parts is not None and share is not None:
                        parts.write(part, [[one.tolist() for one in tap.found[n][-1]] for n in range(len(names))])
                else:
                    for layer, (kept_blocks, errors) in enumerate(kept):
                        both = (torch.tensor(one, dtype=torch.float64) for one in (kept_blocks, errors))
                        tap.found.setdefault(layer, []).append(tuple(both))  # type: ignore[arg-type]
                progress(done + 1, len(inputs))
    means = [[torch.stack(values).mean(0) for values in zip(*tap.found[n], strict=True)] for n in range(len(names))]
    return RuleErrors(tuple(rules), torch.stack([kept for kept, _ in means]), torch.stack([e for _, e in means]))


def allocate_rules(errors: RuleErrors, mean_density: float) -> tuple[tuple[str, ...], ...]:
    """A rule per layer and head with the least summed error: greedy on each head's convex hull.

    Raises:
        ValueError: the mean density is below what the leanest rules keep, or not in (0, 1].
    """
    layers, heads, _ = errors.error.shape
    hulls: dict[tuple[int, int], list[Point]] = {}
    for place in product(range(layers), range(heads)):
        kept, error = errors.kept[place].tolist(), errors.error[place].tolist()
        order = sorted(range(len(kept)), key=lambda n, kept=kept, error=error: (kept[n], error[n]))  # type: ignore[misc]
        hulls[place] = lower_hull(order, [kept[n] for n in order], [error[n] for n in order])
    lowest = sum(hull[0].kept for hull in hulls.values()) / len(hulls)
    if not lowest <= mean_density <= 1.0:
        raise ValueError(f"mean_density must lie in [{lowest:.4f}, 1], got {mean_density}: these rules keep no less.")
    chosen = dict.fromkeys(hulls, 0)
    budget = (mean_density - lowest) * layers * heads
    queue = [(slope(hull, 0), place, 0) for place, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, place, at = heapq.heappop(queue)
        here, there = hulls[place][at : at + 2]
        if there.kept - here.kept > budget + 1e-12:
            continue  # another head may have a step that still fits
        budget -= there.kept - here.kept
        chosen[place] = at + 1
        if at + 2 < len(hulls[place]):
            heapq.heappush(queue, (slope(hulls[place], at + 1), place, at + 1))
    return tuple(
        tuple(errors.rules[int(hulls[layer, head][chosen[layer, head]].asked)] for head in range(heads))
        for layer in range(layers)
    )


def search_rules(
    pipe: Any,
    prompts: Sequence[Any],
    recipe: Recipe | str = "patterns",
    *,
    mean_density: float,
    rules: Sequence[str] = RULES,
    transformer: str | None = None,
    samples: int = 3,
    seed: int = 0,
    generate_kwargs: Mapping[str, Any] | None = None,
    parts: Parts | None = None,
    progress: Callable[[Progress], None] = lambda _state: None,
) -> FoundRules:
    """Find a static pattern for every head of a pipeline's transformer.

    Dense runs of the prompts give the forwards that heads are measured on; each rule is measured on all heads of a
    forward at once. Rules are of the grid: what is found at one size runs at others.

    Args:
        pipe: a diffusers pipeline, not patched.
        prompts: texts, or arguments of the pipeline's call in place of one.
        recipe: a :class:`~dit_accel.Recipe` or a preset's name, of which all but the selection's pattern is used.
        mean_density: to come down to, on average of all heads.
        rules: to choose among, see :class:`~dit_accel.stages.select.head_rules.HeadRules`.
        transformer: of a pipeline with two experts the one to search, "transformer" or "transformer_2".
        samples: denoising steps measured of each prompt, spread over those after the recipe's dense phase. Where the
            recipe carries what is left out, the dense steps that they carry from are run besides.
        seed: of the first prompt's run; each further one adds 1.
        generate_kwargs: further arguments of the pipeline's call, such as size and steps.
        parts: a folder for what is measured so far, as of :func:`~dit_accel.calibration.search.search`.
        progress: told after every run and every forward.

    Raises:
        ValueError: two transformers of which none is named, no prompts, an unknown rule, or a mean density that the
            rules do not reach.
    """
    for rule in rules:
        check_rule(rule)
    if not 0.0 < mean_density <= 1.0:
        raise ValueError(f"mean_density must lie in (0, 1], got {mean_density}.")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}.")
    chosen, runs = presets.resolve(recipe), run_arguments(pipe, prompts, generate_kwargs, None)
    models = {name: model for name, model, _ in transformers_of(pipe)}
    if transformer is None and len(models) > 1:
        raise ValueError(f"{type(pipe).__name__} has {', '.join(models)}, name the one to search.")
    name = transformer or next(iter(models))
    if name not in models:
        raise ValueError(f"{type(pipe).__name__} has no {name!r}; it has {', '.join(models)}.")
    model, inputs, shares = models[name], [], []
    if parts is not None:
        asked = asked_of(pipe, prompts, chosen, samples, seed, generate_kwargs)
        parts.claim({**asked, "rules": list(rules), "transformer": name})
    for number, arguments in enumerate(runs):
        progress(Progress(number, len(runs), None, "dense runs"))
        steps = _SampledSteps(chosen, samples)
        inputs += record_inputs(
            model, partial(pipe, **begin(arguments, seed + number)), first_of_steps(pipe, steps.wants)
        )
        shares += steps.shares
    if all(share is None for share in shares):
        raise ValueError(f"{name!r} runs in none of the {samples} steps a prompt that are to be measured: give more.")
    told = partial(_tell, progress)
    errors = measure_rules(model, chosen, inputs, rules, told, parts, shares)
    found = allocate_rules(errors, mean_density)
    kept, error = kept_and_error(errors, found)
    alike = [(float(errors.error[..., n].sum(1).mean()), n) for n in range(len(rules)) if _mean(errors, n) <= kept]
    least, single = min(alike, default=(None, None))
    return FoundRules(
        _with_rules(chosen, found),
        errors,
        kept,
        error,
        None if single is None else errors.rules[single],
        None if least is None else least**0.5,
    )


class _SampledSteps:
    """The steps of a run that are measured, and the share of what was left out that each adds.

    Attributes:
        shares: of each step that was recorded; see :func:`measure_rules`. Of two experts none runs in all steps.
    """

    def __init__(self, recipe: Recipe, samples: int) -> None:
        self.recipe, self.samples = recipe, samples
        self.shares: list[float | None] = []
        self._of_step: dict[int, float | None] | None = None

    def wants(self, index: int, steps: int) -> bool:
        """Whether a step that the transformer runs is recorded; asked of all of them, rising."""
        if self._of_step is None:
            self._of_step = self._chosen(index, steps)
        if index not in self._of_step:
            return False
        self.shares.append(self._of_step[index])
        return True

    def _chosen(self, first: int, steps: int) -> dict[int, float | None]:
        if isinstance(self.recipe.compensate, Carried):
            return {one.index: one.share for one in carried_steps(self.recipe, steps, self.samples, first)}
        return dict.fromkeys(spread_steps(steps, self.samples, self.recipe.schedule.dense_fraction), 0.0)


def _tell(progress: Callable[[Progress], None], done: int, total: int) -> None:
    progress(Progress(done, total, None, "rules"))


def _mean(errors: RuleErrors, rule: int) -> float:
    return float(errors.kept[..., rule].mean())


def kept_and_error(errors: RuleErrors, chosen: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Mean density, and relative error of a layer's output, of a rule per layer and head."""
    places = torch.tensor([[errors.rules.index(rule) for rule in layer] for layer in chosen])[..., None]
    kept, error = (values.gather(2, places)[..., 0] for values in (errors.kept, errors.error))
    return float(kept.mean()), float(error.sum(1).mean()) ** 0.5


def _with_rules(recipe: Recipe, rules: tuple[tuple[str, ...], ...]) -> Recipe:
    return replace(recipe, select=HeadRules(rules=rules, block=recipe.select.block))


class _MeasuringTap:
    """An :data:`~dit_accel.engine.OutputTap` that leaves outputs as they are, and measures rules on their calls.

    Attributes:
        share: that is added of what each rule left out of the last dense step; None: this is one.
        found: of each layer and measured input kept shares and errors, ``[heads, rules]`` each.
    """

    def __init__(self, dense: Engine, sparse: Sequence[Engine]) -> None:
        self.sparse = sparse
        self.share: float | None = 0.0
        self.found: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._left_out: dict[tuple[int, int], torch.Tensor] = {}
        self._calls: dict[int, AttentionCall] = {}
        for engine in (dense, *sparse):
            engine.observer = lambda call: self._calls.__setitem__(call.layer, call)

    def __call__(self, layer: int, out: torch.Tensor, _model_own: Callable[[], torch.Tensor] | None) -> torch.Tensor:
        call = self._calls.pop(layer)
        whole = out.double().square().sum().clamp_min(1e-30)
        shares, errors = [], []
        for rule, engine in enumerate(self.sparse):
            lost = out - engine.attend(replace(call, run=engine.run, used={}), lambda: out)
            plan = self._calls.pop(layer).plan
            if plan is None:
                raise ValueError(f"self-attention layer {layer} ran dense: a search needs all of them sparse.")
            if self.share is None:
                self._left_out[layer, rule] = lost
                continue
            if self.share:
                lost = lost - self.share * self._left_out[layer, rule]
            counts = plan.mask.kv_num_blocks.double().mean((0, 2)) / plan.mask.num_blocks[1]
            shares.append(counts.expand(out.shape[2]).cpu())
            errors.append((lost.double().square().sum((0, 1, 3)) / whole).cpu())
        if shares:
            self.found.setdefault(layer, []).append((torch.stack(shares, -1), torch.stack(errors, -1)))
        return out
