"""Processes that share a forward skip the same steps and renew the same plans, whatever each sees of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_accel.patches.reuse.together import Together
from tests.patches import together_ranks
from tests.patches.together_ranks import KINDS, STEPS, others, ran, recipe_with
from tests.patches.ulysses_ranks import SPARSE, ended, flux, flux_given, patched, wan_pipeline


@pytest.fixture(scope="module", params=KINDS)
def both(request: Any, tmp_path_factory: Any) -> list[dict[str, Any]]:
    """What each of two processes found."""
    path = tmp_path_factory.mktemp("ranks")
    assert ended(2, together_ranks.work, path, request.param) == [0, 0]
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_a_threshold_on_what_each_sees_is_of_what_all_see(both):
    threshold, at = both[0]["threshold"], both[0]["at"]
    # Alone one process would have skipped that step, and waited for nobody.
    assert both[0]["ratios"][0][at].sub(threshold).sign() != both[0]["ratios"][1][at].sub(threshold).sign()
    alone = ran(wan_pipeline(), recipe_with(threshold))
    assert 0 < alone[2] < 2 * STEPS
    for found in both:
        out, *counts = found["first block"]
        assert counts == list(alone[1:])
        assert (out - alone[0]).abs().max() < 1e-4 * alone[0].abs().max()


@pytest.mark.parametrize("name", others())
def test_other_decisions_are_those_of_one_process(both, name, request):
    kind = request.node.callspec.params["both"]
    alone = ran(wan_pipeline(), others()[name])
    assert torch.equal(both[0][name][0], both[1][name][0])
    assert both[0][name][1:] == both[1][name][1:]
    if name == "drift":
        # Some plans are kept, some renewed: else nothing was decided.
        assert 2 * 2 < both[0][name][3] < 2 * 2 * STEPS
        if kind == "ring":
            return  # whose means are of the blocks of the plan, those of one process of the model's order
    out, *counts = both[0][name]
    assert counts == list(alone[1:])
    assert (out - alone[0]).abs().max() < 1e-4 * alone[0].abs().max()
    assert name == "drift" or alone[2] > 0


def test_one_process_alone_looks_at_no_weight(monkeypatch):
    """A walk through all of them takes a millisecond of every forward, skipped or not."""
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(model, "parameters", lambda: pytest.fail("it walked through the weights"))
    assert Together.of(model) == Together()


def _found(work: Any, path: Any) -> list[dict[str, Any]]:
    assert ended(2, work, path) == [0, 0]
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_tensor_parallel_is_what_one_process_gives(tmp_path):
    for rank, found in enumerate(_found(together_ranks.tensor_parallel, tmp_path)):
        for name in together_ranks.TENSOR_PARALLEL:
            alone, _ = patched(flux(), flux_given(), SPARSE[name])
            out, summary = found[name]
            assert (out - alone).abs().max() < 1e-11 * alone.abs().max()
            assert summary.sparse_calls == 2
            assert summary.parallel == (
                f"tensor parallel: 2 ranks, this rank's heads {3 * rank} to {3 * rank + 2} of 6",
            )


def test_sharded_weights_serve_clips_of_their_own_and_skip_together(tmp_path):
    both = _found(together_ranks.sharded_weights, tmp_path)
    for rank, found in enumerate(both):
        alone = ran(wan_pipeline(), together_ranks.RECIPES["mass"], seed=rank)
        assert (found["sparse"][0] - alone[0]).abs().max() < 1e-4 * alone[0].abs().max()
    assert both[0]["cached"][1:3] == both[1]["cached"][1:3]
    assert both[0]["cached"][2] > 0
