"""Sparse attention under diffusers' context parallelism: several processes give what one gives."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch

from tests.patches import ulysses_ranks
from tests.patches.ulysses_ranks import MODELS, SPARSE, ended, fail, patched, wan, wan_given, work


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: Any, tmp_path_factory: Any) -> list[dict[Any, Any]]:
    """What each process found."""
    path = tmp_path_factory.mktemp("ranks")
    assert ended(request.param, work, path) == [0] * request.param
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


@pytest.mark.parametrize("name", MODELS)
def test_dense_is_equal_to_the_bit(ranks, name):
    for found in ranks:
        equal, dense_calls, _ = found[name, "dense"]
        assert equal
        assert found[name, "unpatched again"]
        assert dense_calls == {"recipe is dense": 2}


@pytest.mark.parametrize("recipe", SPARSE)
@pytest.mark.parametrize("name", MODELS)
def test_sparse_is_what_one_process_gives(ranks, name, recipe):
    build, inputs = MODELS[name]
    model, given = build(), inputs()
    dense, _ = patched(model, given, "dense")
    alone, summary = patched(model, given, SPARSE[recipe])
    scale = dense.abs().max()
    assert (alone - dense).abs().max() > 1e-4 * scale  # else the test shows nothing
    densities = []
    for found in ranks:
        out, dense_calls, sparse_calls, density, _ = found[name, recipe]
        assert (out - alone).abs().max() < 1e-11 * scale
        assert not dense_calls
        assert sparse_calls == summary.sparse_calls == 2
        densities.append(density)
    assert sum(densities) / len(densities) == pytest.approx(summary.density, rel=1e-6)


def test_summary_names_the_heads(ranks):
    each = 6 // len(ranks)
    for rank, found in enumerate(ranks):
        (said,) = found["wan", "pooled"][-1]
        first = rank * each
        assert said == (
            f"context parallel: Ulysses over {len(ranks)} ranks, this rank's heads {first} to {first + each - 1} of 6"
        )


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
def test_ragged_lengths_and_heads_where_diffusers_shares_anything(ranks, recipe):
    heads, size = ulysses_ranks._RAGGED[len(ranks)]
    alone, _ = patched(wan(heads), wan_given(*size), SPARSE[recipe])
    for found in ranks:
        assert found["anything", "dense"]
        out, sparse_calls, _ = found["anything", recipe]
        assert (out - alone).abs().max() < 1e-11 * alone.abs().max()
        assert sparse_calls == 2


def test_a_whole_run_is_what_one_process_gives(ranks):
    if len(ranks) == 3:
        assert "pipeline" not in ranks[0]  # two heads
        return
    alone, summary = ulysses_ranks.run_pipeline(ulysses_ranks.wan_pipeline())
    assert summary.sparse_calls > 0
    for found in ranks:
        out, sparse_calls, dense_calls = found["pipeline"]
        assert (out - alone).abs().max() < 1e-4 * alone.abs().max()
        assert (sparse_calls, dense_calls) == (summary.sparse_calls, summary.dense_calls)


def test_what_cannot_be_shared_is_refused(ranks):
    for found in ranks:
        said = found["refused"]
        assert "heads cannot be shared evenly by ulysses_degree" in said["heads"]
        assert "drift_bound decides by all heads" in said["drift"]
        assert "reuse decides on each device" in said["reuse"]
        assert "learned compensation belongs to all heads" in said["learned"]


@pytest.mark.parametrize("kind", ["killed", "raised"])
def test_a_process_that_fails_ends_the_other(tmp_path, kind):
    codes = ended(2, fail, tmp_path, kind)
    assert codes[1] == (-signal.SIGKILL if kind == "killed" else 1)
    assert codes[0] == 1
