"""Sparse attention whose tokens processes around a ring share: they give what one process gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.patches import ring_ranks, ulysses_ranks
from tests.patches.ring_ranks import MODELS, RAGGED, SPARSE, UNIFIED, recipes_of
from tests.patches.ulysses_ranks import found_by, patched, wan, wan_given

# Of presets what looks at single tokens of the whole sequence.
REFUSED = ("pbs", "psa", "rectified", "agent")


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: Any, tmp_path_factory: Any) -> list[dict[Any, Any]]:
    """What each process found."""
    return found_by(request.param, ring_ranks.work, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: Any) -> list[dict[Any, Any]]:
    """The same of two rings of two."""
    return found_by(4, ring_ranks.unified, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("per_head", [False, True])
def test_attention_is_dense_attention_under_the_mask(ranks, per_head):
    q, k, v, grad, rows, keep = ring_ranks.operation_inputs()
    rows = rows if per_head else rows[:1].expand(2, -1)
    seen = torch.zeros(2, 2, 200, 200, dtype=torch.bool)
    slots = keep.repeat_interleave(32, 2).repeat_interleave(16, 3)[:, :, :200, :200]
    for head in range(2):
        seen[:, head, rows[head][:, None], rows[head]] = slots[:, head]
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", torch.where(seen.any(-1, keepdim=True), weights, 0.0), v)
    out.backward(torch.where(seen.any(-1).transpose(1, 2)[..., None], grad, 0.0))
    parts = [found["operation", per_head] for found in ranks]
    for place, expected in ((0, out), (2, q.grad), (3, k.grad), (4, v.grad)):
        whole = torch.cat([part[place] for part in parts], 1)
        assert float((whole - expected).detach().abs().max()) < 1e-12


@pytest.mark.parametrize(("name", "recipe"), [(name, recipe) for name in MODELS for recipe in recipes_of(name)])
def test_a_ring_gives_what_one_process_gives(ranks, name, recipe):
    build, inputs = MODELS[name]
    model, given = build(), inputs()
    dense, _ = patched(model, given, "dense")
    alone, summary = patched(model, given, SPARSE[recipe])
    scale = dense.abs().max()
    assert (alone - dense).abs().max() > 1e-4 * scale  # else the test shows nothing
    # 8-bit attention computes in float32, whatever it is given. A number next to a tie may round to the other side in
    # the next layer: a step of one of 8 products for some token.
    mean, most = (1e-5, 1e-3) if recipe == "int8" else (1e-11, 1e-11)
    for rank, found in enumerate(ranks):
        out, shared = found[name, recipe]
        assert (out - alone).abs().mean() < mean * scale
        assert (out - alone).abs().max() < most * scale
        assert not shared.dense_calls
        assert shared.sparse_calls == summary.sparse_calls == 2
        assert shared.rank_densities[rank] == pytest.approx(shared.density, rel=1e-6)
        assert shared.rank_densities == ranks[0][name, recipe][1].rank_densities  # of the same plan
        # Of six blocks or more, shared by what each is expected to keep, no process has one too many.
        assert 1.0 <= shared.imbalance < 1 + len(ranks) / 6


def test_every_preset_is_what_one_process_gives_or_refused(ranks):
    for found in ranks:
        ulysses_ranks.assert_presets(found["presets"], REFUSED)


def test_compiled_blocks_go_round_too(ranks):
    for found in ranks:
        out, summary = found["compiled"]
        eager, _ = found["wan", "pooled"]
        assert (out - eager).abs().max() < 1e-11 * eager.abs().max()
        assert summary.sparse_calls == 2
        assert not summary.dense_calls


def test_summary_says_what_was_parallel(ranks):
    size = len(ranks)
    for rank, found in enumerate(ranks):
        _, summary = found["wan", "pooled"]
        assert summary.parallel == (f"context parallel: ring of {size}, this is rank {rank} of it",)
        each = ", ".join(f"{density:.3f}" for density in summary.rank_densities)
        said = f"  by rank: density {each}; the busiest has {summary.imbalance:.2f} times the mean work"
        assert said in summary.lines()


# Wan modulates in float32, and each process adds up its own tokens' gradients there.
@pytest.mark.parametrize(("name", "tolerance"), [("wan", torch.finfo(torch.float32).eps), ("flux", 1e-10)])
def test_gradients_add_up_to_those_of_one_process(ranks, name, tolerance):
    build, inputs = MODELS[name]
    alone = ulysses_ranks.gradients(build(), inputs(), SPARSE["pooled"])
    largest = max(float(one.abs().max()) for one in alone)
    for found in ranks:
        for one, shared in zip(alone, found[name, "gradients"], strict=True):
            assert float((one - shared).abs().max()) <= tolerance * largest


@pytest.mark.parametrize("recipe", ["pooled", "mass"])
def test_ragged_lengths_where_diffusers_shares_anything(ranks, recipe):
    alone, _ = patched(wan(), wan_given(*RAGGED), SPARSE[recipe])
    for found in ranks:
        out, summary = found["anything", recipe]
        assert (out - alone).abs().max() < 1e-11 * alone.abs().max()
        assert summary.sparse_calls == 2


def test_a_whole_run_is_what_one_process_gives(ranks):
    alone, summary = ulysses_ranks.run_pipeline(ulysses_ranks.wan_pipeline())
    assert summary.sparse_calls > 0
    for found in ranks:
        out, sparse_calls, dense_calls = found["pipeline"]
        assert (out - alone).abs().max() < 1e-4 * alone.abs().max()
        assert (sparse_calls, dense_calls) == (summary.sparse_calls, summary.dense_calls)


def test_what_cannot_be_shared_is_refused(ranks):
    for found in ranks:
        said = found["refused"]
        assert said["select"].startswith("select Sampled looks at single tokens of the whole sequence")
        assert said["compensate"].startswith(
            "compensate AgentTokens has one softmax of every agent over single keys of the whole"
        )
        assert said["order"].startswith("order ")
        assert "an order per head knows no mask of keys" in said["order per head"]
        assert f"cannot be shared by ring_degree={len(ranks)} processes" in said["blocks"]


@pytest.mark.parametrize("recipe", ["pooled", "mass", "window"])
@pytest.mark.parametrize("name", UNIFIED)
def test_two_rings_of_two_give_what_one_process_gives(four, name, recipe):
    build, inputs = UNIFIED[name]
    alone, _ = patched(build(), inputs(), SPARSE[recipe])
    for rank, found in enumerate(four):
        out, summary = found[name, recipe]
        assert (out - alone).abs().max() < 1e-11 * alone.abs().max()
        assert summary.sparse_calls == 2
        assert not summary.dense_calls
        assert len(summary.rank_densities) == 4
        assert summary.rank_densities[rank] == pytest.approx(summary.density, rel=1e-6)


def test_gradients_of_two_rings_of_two(four):
    alone = ulysses_ranks.gradients(wan(4), wan_given(), SPARSE["pooled"])
    largest = max(float(one.abs().max()) for one in alone)
    for found in four:
        for one, shared in zip(alone, found["gradients"], strict=True):
            assert float((one - shared).abs().max()) <= torch.finfo(torch.float32).eps * largest
