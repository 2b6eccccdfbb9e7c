"""Sparse attention under diffusers' context parallelism: several processes give what one gives."""

from __future__ import annotations

import signal
import sys
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel.heads import HeadShard
from dit_accel.layout import TokenLayout
from dit_accel.plan import SequenceBlocks
from dit_accel.stages.select.frozen import FrozenMasks
from dit_accel.stages.select.protocol import shares_per_head
from tests.patches import ulysses_ranks
from tests.patches.ulysses_ranks import (
    MODELS,
    SPARSE,
    assert_presets,
    ended,
    fail,
    patched,
    wan,
    wan_given,
    work,
)
from tests.recipes import POOLED
from tests.tiny_registry import MODELS as REGISTRY


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


def test_every_preset_is_what_one_process_gives(ranks):
    for found in ranks:
        assert_presets(found["presets"])


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


@pytest.mark.parametrize("name", ulysses_ranks.REGISTERED)
def test_other_models_of_odd_lengths(ranks, name):
    if len(ranks) == 3:
        assert ("registered", name) not in ranks[0]  # two heads
        return
    tiny = REGISTRY[name]
    model = tiny.build()
    dense = tiny.run(model)
    with dit_accel.patch(model, POOLED):
        alone = tiny.run(model)
    assert (alone - dense).abs().max() > 1e-4 * dense.abs().max()
    for found in ranks:
        equal, out = found["registered", name]
        assert equal
        assert (out - alone).abs().max() < 1e-11 * dense.abs().max()


def test_calibrated_masks_and_densities_are_cut_to_the_heads():
    layout = TokenLayout((1, 8, 8), 0, 64)
    bits = torch.randint(0, 256, (1, 2, 6, 4, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    masks = FrozenMasks(layout, (16, 16), (), bits)
    blocks = SequenceBlocks(layout, None, 16, 16, torch.device("cpu"))
    shard = HeadShard(2, 3, 6, lambda own: own)
    whole = masks.mask(1, 0, blocks, None).to_dense()
    assert torch.equal(masks.mask(1, 0, blocks, None, heads=shard).to_dense(), whole[:, 2:5])
    shares = shares_per_head(((0.1, 0.2, 0.3, 0.4, 0.5, 0.6),), None, 3, torch.device("cpu"), shard)
    assert torch.equal(shares, torch.tensor([[0.3, 0.4, 0.5]]))
    with pytest.raises(ValueError, match="for 3 heads, the layer has 6"):
        shares_per_head(((0.1, 0.2, 0.3),), None, 3, torch.device("cpu"), shard)


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
        assert f"leave none for the last of ulysses_degree={len(ranks)} processes" in said["no head"]


@pytest.mark.parametrize("kind", ["killed", "raised", "ring", "compiled"])
def test_a_process_that_fails_ends_the_other(tmp_path, kind):
    codes = ended(2, fail, tmp_path, kind)
    assert codes[1] == (-signal.SIGKILL if kind == "killed" else 1)
    assert codes[0] == 1
    *_, error, said = ["", *(tmp_path / "said0.txt").read_text().splitlines()]
    told = "Another process ended this forward: rank 1 failed with RuntimeError: this rank fails"
    if kind in ("raised", "compiled"):
        assert said == f"OtherRankFailed: {told}"
    elif kind == "ring" and sys.version_info >= (3, 11):
        # It waits in diffusers' own exchange behind the last layer.
        assert error.startswith("RuntimeError: ")
        assert said == told
