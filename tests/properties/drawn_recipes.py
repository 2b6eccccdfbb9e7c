"""Recipes whose every axis, kind and field is drawn, of sizes that suit a hundred tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import strategies as st

from dit_accel import Recipe
from dit_accel.recipe import AXES
from dit_accel.stages.order.axes import HEAD_ORDERS

shares = st.sampled_from((0.05, 0.25, 0.5, 0.8, 1.0))
triples = st.tuples(*[st.integers(1, 4)] * 3)
block_sizes = st.sampled_from((32, 32, 64))
densities = st.one_of(st.just(()), st.lists(shares, min_size=2, max_size=2).map(lambda heads: (tuple(heads),)))
cumulative = st.lists(shares, min_size=4, max_size=4).map(lambda bounds: tuple(sorted(bounds)))
points = st.lists(st.tuples(st.sampled_from((0.0, 0.3, 0.6)), shares), max_size=3, unique_by=lambda p: p[0]).map(tuple)

# By class name and field, or by field.
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "shape": triples,
    "axes": st.lists(st.sampled_from(HEAD_ORDERS), min_size=2, max_size=2).map(lambda heads: (tuple(heads),)),
    "sparse_weight": st.sampled_from((0.0, 0.5, 1.0)),
    "ChosenAxes.tile": st.sampled_from((16, 64)),
    "temporal": st.integers(1, 4),
    "spatial": st.tuples(st.integers(1, 4), st.integers(1, 4)),
    "volume": triples,
    "segment": triples,
    "samples": st.integers(1, 40),
    "block": st.tuples(block_sizes, block_sizes),
    "Window.window": st.tuples(*[st.sampled_from((0.3, 0.7, 1.0))] * 3),
    "stride": triples,
    "dilation": st.just((1, 1, 1)),
    "TileWindow.window": triples,
    "tile": st.tuples(st.integers(1, 3), st.integers(2, 4), st.integers(2, 4)),
    "radius": st.sampled_from((0.5, 2.0, 5.0)),
    "decay": shares,
    "min_width": st.integers(1, 9),
    "density": shares,
    "rank": st.sampled_from((6, 24, 7)),
    "Learned.form": st.sampled_from(("pooled", "low_rank", "linear", "values", "none")),
    "rules": st.sampled_from(
        (
            (("full",),),
            (("window 1.0 0.5 0.5", "strided 3"),),
            (("near 0.25 wh", "cells 1 2 2"),),
            (("window 1 2 0.5 sink",),),
            (("none",),),
        )
    ),
    "keep_own": st.booleans(),
    "whole": st.booleans(),
    "score": st.sampled_from(("mass", "error")),
    "budget": st.sampled_from(("row", "head", "layer")),
    "tokens": st.sampled_from((0, 8, 16)),
    "alpha": st.sampled_from((0.0, 0.5, 3.0)),
    "zeta": st.sampled_from((1.0, 1.03)),
    "kept": st.sampled_from((0.25, 0.75, 1.0)),
    "lasts": st.sampled_from((0.1, 0.8, 1.0)),
    "bits": st.sampled_from((8, 16)),
    "means": st.booleans(),
    "slope": st.sampled_from((0.0, 0.5, 1.0)),
    "correction": st.sampled_from((0.0, 0.7, 1.0)),
    "top_p": shares,
    "sink_first_frame": st.booleans(),
    "first_frame_apart": st.booleans(),
    "head_densities": densities,
    "similarity": st.sampled_from((-1.0, 0.0, 0.5)),
    "smooth_k": st.booleans(),
    "head_adaptive": st.booleans(),
    "recall_target": shares,
    "query_stride": st.sampled_from((1, 2, 4)),
    "cache_lse": st.booleans(),
    "threshold": shares,
    "neighbours": st.integers(0, 2),
    "share": shares,
    "seed": st.integers(0, 3),
    "gain_aware": st.booleans(),
    "cumulative": cumulative,
    "KeyPyramid.similarity": st.sampled_from(((), (0.7, 0.65, 0.6), (-1.0, -1.0, 0.2))),
    "sharpen": st.sampled_from((0.3, 1.0)),
    "shortcut": st.sampled_from((0.0, 0.075)),
    "form": st.sampled_from(("paper", "non_critical", "all_tokens")),
    "feature_map": st.sampled_from(("softmax", "elu", "relu", "hedgehog")),
    "negligible_share": st.sampled_from((0.0, 0.1, 0.5)),
    "smooth_q": st.booleans(),
    "key_scales": st.sampled_from(("block", "thread")),
    "rotate": st.just(False),  # of few head dims alone
    "dense_fraction": st.sampled_from((0.0, 0.2, 1.0)),
    "dense_layers": st.sampled_from(((), (0,), (0, -1))),
    "refresh_every": st.integers(1, 4),
    "refresh_at": st.sampled_from(((), (0.0,), (0.2, 0.6))),
    "dense_refresh": st.booleans(),
    "plan_in_dense_phase": st.booleans(),
    "density_points": points,
    "density_over": st.sampled_from(("progress", "sigma")),
    "choose_every": st.integers(0, 2),
    "own_dense": st.booleans(),
    "few_steps": st.sampled_from((0, 3, 8)),
    "drift_bound": st.sampled_from((None, 0.1)),
    "FirstBlock.threshold": st.sampled_from((0.0, 0.05, 2.0)),
    "Magnitude.threshold": st.sampled_from((0.0, 0.06)),
    "Energy.threshold": st.sampled_from((0.0, 0.25)),
    "max_skipped": st.integers(0, 3),
    "retention": st.sampled_from((0.0, 0.2, 1.0)),
    "ratios": st.sampled_from(((), (1.0, 1.02, 0.97))),
    "interval": st.integers(1, 4),
    "warmup": st.integers(0, 3),
    "order": st.integers(0, 2),
    "first": st.integers(0, 2),
    "last": st.integers(0, 2),
    "power": st.sampled_from((1.0, 3.0)),
    "computed": st.lists(st.integers(0, 9), max_size=4).map(tuple),
    "guided": st.lists(st.integers(0, 9), max_size=4).map(tuple),
    "num_steps": st.integers(1, 10),
}


def stages(axis: str, *without: str) -> st.SearchStrategy[Any]:
    """Values of an axis: any kind, any fields, of which some stay at their defaults; or the ValueError of such."""
    return st.one_of([_of_kind(kind) for name, kind in AXES[axis].items() if name not in without])


def _of_kind(kind: type[Any]) -> st.SearchStrategy[Any]:
    drawn = {}
    for field in dataclasses.fields(kind):
        own = f"{kind.__name__}.{field.name}"
        drawn[field.name] = FIELDS[own] if own in FIELDS else FIELDS[field.name]  # a KeyError: give it values here
    # Blocks of the defaults are as long as the sequences.
    block = {"block": drawn.pop("block")} if "block" in drawn else {}
    return st.fixed_dictionaries(block, optional=drawn).map(lambda fields: _made(kind, fields))


def _made(kind: type[Any], fields: dict[str, Any]) -> Any:
    try:
        return kind(**fields)
    except ValueError as error:
        assert_sentence(error)
        return None


def assert_sentence(error: Exception) -> None:
    """An error that a user may see: one line that ends."""
    text = str(error)
    assert text.endswith("."), text
    assert "\n" not in text
    assert len(text.split()) > 4


@st.composite
def recipes(draw: st.DrawFn, runnable: bool = False) -> Recipe | None:
    """Any recipe; None where it, or a stage, was refused with a sentence.

    Args:
        runnable: none that is dense or needs a calibration, and no phase that is.
    """
    drawn = {
        "order": draw(stages("order", *(("chosen_axes",) if runnable else ()))),
        "select": draw(stages("select", *(("dense",) if runnable else ()))),
        "compensate": draw(stages("compensate")),
        "precision": draw(stages("precision")),
        "schedule": AXES["schedule"]["schedule"]() if runnable else draw(stages("schedule")),
        # A bare transformer has no steps to reuse.
        "reuse": AXES["reuse"]["none"]() if runnable else draw(stages("reuse")),
    }
    if None in drawn.values():
        return None
    try:
        return Recipe(**drawn)
    except ValueError as error:
        assert_sentence(error)
        return None
