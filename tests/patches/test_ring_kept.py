"""Kept plans around a ring: cut once each, and never taken for those of another run, size or pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.patches import ring_kept_ranks
from tests.patches.ring_kept_ranks import RUNS
from tests.patches.ulysses_ranks import found_by, wan_pipeline


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: Any) -> list[dict[Any, Any]]:
    """What each of two processes found."""
    return found_by(2, ring_kept_ranks.work, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone() -> dict[Any, Any]:
    """The same in one process."""
    return ring_kept_ranks.runs([wan_pipeline(), wan_pipeline()])


@pytest.mark.parametrize("pipeline", [0, 1])
@pytest.mark.parametrize("name", RUNS)
def test_runs_in_turns_are_those_of_one_process_and_a_plan_is_cut_once(ranks, alone, name, pipeline):
    wanted, calls, plans, cuts = alone[name, pipeline]
    assert cuts == 0
    assert 0 < plans == calls / 2  # each serves two steps
    for found in ranks:
        out, sparse_calls, plans_made, cuts = found[name, pipeline]
        # The pipeline's scheduler computes in float32.
        assert (out - wanted).abs().max() < 1e-4 * wanted.abs().max()
        assert (sparse_calls, plans_made) == (calls, plans)
        assert cuts == plans


def test_the_runs_differ(alone):
    first, second = (alone["first", pipeline][0] for pipeline in (0, 1))
    assert (first - second).abs().max() > 1e-2 * first.abs().max()
    assert alone["wider", 0][0].shape != first.shape
    assert torch.equal(alone["again", 0][0], first)
