"""Runs whose blocks are replayed as graphs, beside runs without."""

from __future__ import annotations

from typing import Any

import torch

import dit_accel
from dit_accel.patches.graphs.install import install_graphs
from dit_accel.patches.handle import PatchHandle
from dit_accel.patches.learned import is_learned
from tests import pipe_calls
from tests.pipe_calls import Call


def with_graphs(handle: PatchHandle) -> PatchHandle:
    handle.record_change(install_graphs(handle), "graphs")
    return handle


def facts(handle: PatchHandle) -> dict[str, Any]:
    """All that a summary says but how calls were computed, and how long."""
    found = handle.summary().to_dict()
    layers = [{**layer, "replayed_calls": 0} for layer in found.pop("layers")]
    left_out = ("plan_seconds", "sparse_seconds", "dense_seconds", "replayed_calls", "changes", "notes")
    return {**{name: value for name, value in found.items() if name not in left_out}, "layers": layers}


def notes(handle: PatchHandle) -> list[str]:
    return [note for note in handle.summary().notes if "CUDA graphs" in note]


def learn_something(pipe: Any) -> None:
    """What a recipe learns adds nothing at the start."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if is_learned(name):
                parameter.normal_(std=0.3)


def assert_alike(recipe: dit_accel.Recipe, steps: int, size: dict[str, int] | None = None, **options: Any) -> None:
    """A run under a recipe has the same bits and counts with graphs as without, and no block gives them up.

    ``size`` is of the call where it has another, and ``options`` are of :func:`dit_accel.patch`.
    """
    pipe, call, more = pipe_calls.build("wan"), Call(steps, 0), size or {}
    with dit_accel.patch(pipe, recipe, **options) as handle:
        learn_something(pipe)
        handle.record_steps()
        wanted = pipe_calls.perform(pipe, "wan", call, **more)
        counted = facts(handle)
    with with_graphs(dit_accel.patch(pipe, recipe, **options)) as handle:
        learn_something(pipe)
        handle.record_steps()
        assert pipe_calls.perform(pipe, "wan", call, **more).equal(wanted)
        assert facts(handle) == counted
        assert not notes(handle)
