"""What dense runs show of a model's attention, summed up, and the plans that follow from the sums."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..api import patch
from ..call import AttentionCall
from ..kernels.mask.packed import pack_bits
from ..kernels.mask.pairs import PairMask
from ..layout import TokenLayout
from ..patches.artifact import CalibratedTransformer, CalibrationArtifact, read_tensors, write_tensors
from ..patches.fingerprint import Fingerprint
from ..patches.progress import sigmas_of
from ..patches.targets import self_attentions, transformers_of
from ..plain_data import first_difference
from ..plan import SequenceBlocks
from ..recipe import Recipe
from ..stages.order.axes import AxisOrder, ChosenAxes
from ..stages.order.axis_choice import AxisScores, measure_axes
from ..stages.select.frozen import FrozenMasks, bucket_edges
from .progress import Clock

AXIS_STEPS = 3
# Ends of the names of sums that are not of block scores.
_AXES, _SEEN = "axes", "seen"


class Observations:
    """Sums over the calls of dense runs, and how many runs are in them: what a calibration goes on from, and chooses
    by.

    Args:
        pipe: a diffusers pipeline, not patched.
        recipe: whose plans are to be made.
        buckets: noise levels with masks of their own.
        asked: all that makes a calibration another one.
    """

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
