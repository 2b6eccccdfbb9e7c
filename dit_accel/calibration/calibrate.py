"""Run a few prompts densely, and keep what a recipe would choose: axis orders, masks per noise level."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import presets
from ..api import patch
from ..call import AttentionCall
from ..files import refuse_unwritable
from ..kernels.mask.packed import pack_bits
from ..kernels.mask.pairs import PairMask
from ..layout import TokenLayout
from ..patches.artifact import CalibratedTransformer, CalibrationArtifact, read_tensors, write_tensors
from ..patches.fingerprint import Fingerprint
from ..patches.learned import head_shape
from ..patches.progress import sigmas_of
from ..patches.targets import self_attentions, transformers_of
from ..plain_data import first_difference
from ..plan import SequenceBlocks
from ..recipe import Recipe
from ..stages.order.axes import AxisOrder, ChosenAxes
from ..stages.order.axis_choice import AxisScores, measure_axes
from ..stages.select.frozen import FrozenMasks, bucket_edges
from ..stages.select.protocol import density_of_layer, shares_per_head
from .identity import describe, describe_pipeline
from .progress import Clock, Progress
from .runs import begin, run_arguments

AXIS_STEPS = 3
# Ends of the names of sums that are not of block scores.
_AXES, _SEEN = "axes", "seen"


def calibrate(
    pipe: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    recipe: Recipe | str,
    *,
    out: str | Path | None = None,
    buckets: int = 4,
    seeds: Sequence[int] | None = None,
    axis_prompts: int = 1,
    generate_kwargs: Mapping[str, Any] | None = None,
    resume: bool = True,
    progress: Callable[[Progress], None] = lambda _state: None,
    **options: Any,
) -> CalibrationArtifact:
    """Make a recipe's plans offline, from dense runs of a few prompts.

    A mean is taken over prompts, guidance branches and the steps of a noise level: of the exact block mass
    (selections by mass), of the pooled softmax (pooled selections), or of the masks themselves, of which blocks
    are then kept that at least half the calls chose (CalibAtt, arXiv 2603.05503). Recipes with ``ChosenAxes``
    first get an axis order per head (PAROAttention, arXiv 2506.16054).

    Args:
        pipe: a diffusers pipeline, not patched.
        prompts: texts, or arguments of the pipeline's call in place of one.
        recipe: a :class:`~dit_accel.Recipe` or a preset's name.
        out: file to write. What is done so far is kept beside it after every run, and a calibration that was
            interrupted goes on from there: the very same, of the same weights, prompts and arguments.
        buckets: noise levels with masks of their own; see :func:`~dit_accel.stages.select.frozen.bucket_edges`.
        seeds: of the runs, one per prompt; 0, 1, 2... if None.
        axis_prompts: how many of the prompts the axis orders are measured on.
        generate_kwargs: further arguments of the pipeline's call, such as size and steps: plans hold for one size,
            and for any number of steps.
        resume: False begins anew.
        progress: told after every denoising step.
        options: of the named preset.

    Raises:
        ValueError: a recipe with nothing to calibrate or that does not fit the model, what
            :func:`~dit_accel.calibration.runs.run_arguments` refuses, weights that cannot be read, a file that cannot
            be written, or what is beside ``out`` belongs to another calibration: all before the first run. A
            scheduler without sigmas, or a transformer that is never sparse: in or after the first.
    """
    chosen = presets.resolve(recipe, **options)
    arguments = run_arguments(pipe, prompts, generate_kwargs, seeds)
    for name, value in (("buckets", buckets), ("axis_prompts", axis_prompts)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    refuse_calibration(chosen, None if out is None else Path(out))
    _refuse_shares(chosen, pipe)
    draft = None if out is None else _beginning(Path(out))
    seeds = tuple(range(len(prompts)) if seeds is None else seeds)
    from .. import __version__

    asked = {
        "dit_accel": __version__,
        "recipe": chosen.to_dict(),
        "prompts": describe(prompts),
        "seeds": list(seeds),
        "buckets": buckets,
        "axis_prompts": axis_prompts,
        "arguments": describe(generate_kwargs or {}),
        "pipeline": describe_pipeline(pipe),
    }
    run = _Run(pipe, chosen, buckets, asked)
    if draft is not None and resume and draft.exists():
        run.restore(draft)
    runs = [("axis orders", n) for n in range(min(axis_prompts, len(prompts)))] if run.axes is not None else []
    runs += [("masks", n) for n in range(len(prompts))]
    clock = Clock(len(runs), run.finished, progress)
    for number, (stage, n) in enumerate(runs):
        if number < run.finished:
            continue
        if stage == "masks":
            run.choose_axes()
        run.observe(stage, begin(arguments[n], seeds[n]), clock)
        run.finished = number + 1
        if draft is not None:
            run.save(draft)
    artifact = run.artifact()
    if out is not None:
        artifact.save(out)
        assert draft is not None
        draft.unlink(missing_ok=True)
    return artifact


def refuse_calibration(recipe: Recipe, out: Path | None) -> None:
    """Check what can be known before the model is loaded.

    Raises:
        ValueError: a recipe with nothing to calibrate, or a file that cannot be written.
    """
    if recipe.select.is_static:
        raise ValueError(
            f"{type(recipe.select).__name__} chooses nothing from queries and keys: there is nothing to calibrate."
        )
    if recipe.order.follows_call:
        name = type(recipe.order).__name__
        raise ValueError(f"{name} orders each call anew: masks made for one call mean nothing in another.")
    if recipe.select.is_learned:
        name = type(recipe.select).__name__
        raise ValueError(f"{name} chooses by a gate of each layer, which a calibration does not know.")
    if recipe.order.pads:
        name = type(recipe.order).__name__
        raise ValueError(f"{name} fills blocks with padding, which a calibration does not know.")
    for path in () if out is None else (out, _beginning(out)):
        refuse_unwritable(path)


def _beginning(out: Path) -> Path:
    """Where the beginning of a calibration is kept until the file is whole."""
    return out.with_name(out.name + ".partial")


def _refuse_shares(recipe: Recipe, pipe: Any) -> None:
    """Refuse densities per head that do not fit the model."""
    shares = recipe.select.head_densities
    for _, model, family in transformers_of(pipe):
        for layer, (_, module) in enumerate(self_attentions(model, family)):
            shares_per_head(density_of_layer(shares, layer), None, head_shape(module)[0], torch.device("cpu"))


class _Run:
    """The state of a calibration: what was summed up, and how many runs are in it."""

    def __init__(self, pipe: Any, recipe: Recipe, buckets: int, asked: Mapping[str, Any]) -> None:
        self.pipe, self.recipe, self.buckets, self.asked = pipe, recipe, buckets, dict(asked)
        # Axis orders are to be chosen first.
        self.axes = recipe.order if isinstance(recipe.order, ChosenAxes) else None
        self.finished = 0
        attentions = {name: dict(self_attentions(model, family)) for name, model, family in transformers_of(pipe)}
        self.layers = {name: len(modules) for name, modules in attentions.items()}
        self.fingerprints = {name: Fingerprint.of(model, attentions[name]) for name, model, _ in transformers_of(pipe)}
        # "name/layer/..." to sums over calls, and how many there were.
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        self.layouts: dict[str, TokenLayout] = {}
        self.sigmas: list[float] = []
        self.orders: dict[str, AxisOrder] = {}
        self._blocks: dict[Any, tuple[SequenceBlocks, Any]] = {}

    def observe(self, stage: str, arguments: dict[str, Any], clock: Clock) -> None:
        """One dense run of the pipeline."""
        if "callback_on_step_end" in inspect.signature(type(self.pipe).__call__).parameters:
            users = arguments.get("callback_on_step_end")

            def after(pipe: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
                clock.tick(pipe.num_timesteps, stage)
                return state if users is None else users(pipe, step, timestep, state)

            arguments["callback_on_step_end"] = after
        with patch(self.pipe, "dense") as handle:
            look = self._see_axes if stage == "axis orders" else self._see_mask
            with handle.observe(look), torch.no_grad():
                self.pipe(**arguments)
        for name in self.layers.keys() - self.layouts.keys():
            raise ValueError(f"{name or 'the transformer'} ran no sparse step: nothing can be calibrated for it.")

    def _sparse_sigmas(self, call: AttentionCall) -> list[float]:
        """Sigmas of the run's sparse steps."""
        if not self.sigmas:
            sigmas = sigmas_of(self.pipe.scheduler)
            if not sigmas or call.step.num_steps is None or call.step.sigma is None:
                raise ValueError(
                    f"{type(self.pipe.scheduler).__name__} has no sigmas, by which calibrated plans are found."
                )
            count = call.step.num_steps
            steps = [replace(call.step, index=n) for n in range(count)]
            self.sigmas = [
                sigmas[n]
                for n, step in enumerate(steps)
                if self.recipe.schedule.dense_reason(replace(step, sigma=None), -(10**6), 10**7) is None
            ]
            if not self.sigmas:
                raise ValueError(f"All {count} steps of the run are dense under {self.recipe.schedule}.")
        return self.sigmas

    def _counts_here(self, name: str, call: AttentionCall) -> bool:
        if name not in self.layers:
            return False  # a control network has no part in it
        sigmas = self._sparse_sigmas(call)
        if isinstance(call.layout, str) or call.step.sigma is None or call.step.sigma > sigmas[0] * (1 + 1e-6):
            return False
        if self.recipe.schedule.dense_reason(call.step, call.layer, self.layers[name]) is not None:
            return False
        before = self.layouts.setdefault(name, call.layout)
        if before != call.layout:
            raise ValueError(f"The prompts must share one layout, got {before} and {call.layout}.")
        return True

    def _see_axes(self, name: str, call: AttentionCall) -> None:
        if not self._counts_here(name, call):
            return
        sigmas = self.sigmas
        picks = {round(n * (len(sigmas) - 1) / max(AXIS_STEPS - 1, 1)) for n in range(AXIS_STEPS)}
        nearest = min(range(len(sigmas)), key=lambda n: abs(sigmas[n] - (call.step.sigma or 0.0)))
        if nearest not in picks:
            return
        assert isinstance(call.layout, TokenLayout)
        assert self.axes is not None
        scores = measure_axes(
            call.layout,
            call.q,
            call.k,
            key_mask=call.key_mask,
            pairs=call.pairs,
            scale=call.scale,
            tile=self.axes.tile,
        )
        self._add(f"{name}/{call.layer}/{_AXES}", torch.stack([scores.sparse, scores.incoherence]))

    def choose_axes(self) -> None:
        """Fill in the orders once their runs are done."""
        if self.axes is None or self.orders:
            return
        weight = self.axes.sparse_weight
        for name, layers in self.layers.items():
            axes = []
            for layer in range(layers):
                total = self.sums.get(key := f"{name}/{layer}/{_AXES}")
                # A layer that stays dense has no order of its own.
                axes.append(("fhw",) if total is None else AxisScores(*(total / self.counts[key])).choose(weight))
            self.orders[name] = AxisOrder(tuple(axes))

    def _order(self, name: str) -> Any:
        return self.recipe.order if self.axes is None else self.orders[name]

    def _see_mask(self, name: str, call: AttentionCall) -> None:
        if not self._counts_here(name, call):
            return
        edges = bucket_edges(self.sigmas, self.buckets)
        bucket = sum((call.step.sigma or 0.0) < edge for edge in edges)
        blocks, tables = self._blocks_of(name, call)
        key = f"{name}/{call.layer}/{bucket}"
        if call.pairs is None:
            self._add(key, self.recipe.select.scores(blocks, tables, call).mean(0))
            return
        seen = call.seen = PairMask.of(call.pairs, blocks.kernel_rows, blocks.block_q, blocks.block_k)
        try:
            self._add(key, self.recipe.select.scores(blocks, tables, call).mean(0))
        finally:
            call.seen = None
        self._add(f"{key}/{_SEEN}", seen.visible.float().mean(0))

    def _blocks_of(self, name: str, call: AttentionCall) -> tuple[SequenceBlocks, Any]:
        order, layout, device = self._order(name), call.layout, call.q.device
        assert isinstance(layout, TokenLayout)
        select = self.recipe.select
        key = (name, layout, device, order.variant(call.layer))
        if key not in self._blocks:
            blocks = SequenceBlocks(layout, order.rows(layout, device, call.layer), *select.block, device)
            self._blocks[key] = blocks, select.prepare(blocks)
        return self._blocks[key]

    def _add(self, key: str, value: torch.Tensor) -> None:
        value = value.to("cpu", torch.float64 if key.endswith(_AXES) else torch.float32)
        self.sums[key] = self.sums[key].add_(value) if key in self.sums else value.clone()
        self.counts[key] = self.counts.get(key, 0) + 1

    def artifact(self) -> CalibrationArtifact:
        """Masks from the means."""
        parts = {}
        for name, fingerprint in self.fingerprints.items():
            order, edges = self._order(name), bucket_edges(self.sigmas, self.buckets)
            recipe = replace(self.recipe, order=order)
            select = recipe.select
            layout = self.layouts[name]
            bits = torch.stack(
                [
                    torch.stack([self._mask(name, layer, bucket, len(edges)) for layer in range(self.layers[name])])
                    for bucket in range(len(edges) + 1)
                ]
            )
            parts[name] = CalibratedTransformer(fingerprint, recipe, FrozenMasks(layout, select.block, edges, bits))
        facts = {
            "scheduler": type(self.pipe.scheduler).__name__,
            "sigmas": self.sigmas,
            "prompts": self.asked["prompts"],
            "seeds": self.asked["seeds"],
            "arguments": self.asked["arguments"],
            "torch": torch.__version__,
        }
        return CalibrationArtifact(self.recipe, parts, facts)

    def _mask(self, name: str, layer: int, bucket: int, last: int) -> torch.Tensor:
        """uint8 ``[H, nq, bytes]`` of one layer and noise level; all blocks where the layer stays dense."""
        # Of two transformers each sees some of the noise levels: the nearest one stands in.
        known = [n for n in range(last + 1) if f"{name}/{layer}/{n}" in self.sums]
        select, layout = self.recipe.select, self.layouts[name]
        device = torch.device("cpu")
        blocks = SequenceBlocks(layout, self._order(name).rows(layout, device, layer), *select.block, device)
        heads = next(value.shape[0] for key, value in self.sums.items() if not key.endswith((_AXES, _SEEN)))
        if not known:
            return pack_bits(torch.ones(heads, *blocks.num_blocks, dtype=torch.bool))
        key = f"{name}/{layer}/{min(known, key=lambda n: abs(n - bucket))}"
        mean = (self.sums[key] / self.counts[key])[None]
        seen = self.sums.get(f"{key}/{_SEEN}")
        if seen is None:
            return pack_bits(select.of_layer(layer).chosen_by(blocks, mean)[0])
        return pack_bits(select.of_layer(layer).chosen_by(blocks, mean, seen[None] == 0)[0])

    def save(self, path: Path) -> None:
        """Keep what is done."""
        header = {
            "asked": self.asked,
            "finished": self.finished,
            "counts": self.counts,
            "sigmas": self.sigmas,
            "orders": {name: order.axes for name, order in self.orders.items()},
            "layouts": {name: layout.to_numbers() for name, layout in self.layouts.items()},
        }
        write_tensors(path, self.sums, header)

    def restore(self, path: Path) -> None:
        """Go on from what :meth:`save` kept.

        Raises:
            ValueError: it belongs to another calibration, or is damaged.
        """
        anew = "Delete it or pass resume=False."
        try:
            header, sums = read_tensors(path)
            if not isinstance(header["asked"], dict):
                raise TypeError("what was asked is no object")
            difference = first_difference(header["asked"], json.loads(json.dumps(self.asked)))
            if sums.keys() != header["counts"].keys():
                raise ValueError("its sums are not those counted")
            self.sums, self.counts = sums, header["counts"]
            self.finished, self.sigmas = int(header["finished"]), header["sigmas"]
            self.orders = {name: AxisOrder(tuple(map(tuple, axes))) for name, axes in header["orders"].items()}
            self.layouts = {name: TokenLayout.from_numbers(numbers) for name, numbers in header["layouts"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = str(error).rstrip(".")
            raise ValueError(f"{path} is the damaged beginning of a calibration ({reason}). {anew}") from error
        if difference is not None:
            raise ValueError(f"{path} is the beginning of another calibration: {difference}. {anew}")
