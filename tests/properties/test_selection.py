"""Selection of blocks on any scores: the definition's blocks, and never a row without any or a block out of range."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.kernels import BlockMask
from dit_accel.kernels.selection.api import own_blocks, select_blocks
from dit_accel.kernels.selection.gate import select_by_threshold
from dit_accel.layout import TokenLayout
from dit_accel.plan import LayerMemory, SequenceBlocks
from dit_accel.recipe import SELECTS
from dit_accel.stages.select.grid import TileWindow
from tests.calls import call_of, gated
from tests.kernels.selection_oracle import assert_lists, at, loop_select
from tests.properties.drawn import booleans, layouts, normal, odd_numbers, scores, seeds, times

CPU = torch.device("cpu")
shares = st.one_of(st.sampled_from((1e-6, 1.0)), st.integers(1, 1000).map(lambda n: n / 1000))


@st.composite
def calls(draw: st.DrawFn, largest: int = 9) -> dict[str, Any]:
    """Arguments of select_blocks, with scores of 2 batch entries and 2 heads."""
    block_q, block_k = draw(st.sampled_from(((16, 16), (32, 16), (16, 32), (7, 5))))
    nq, nk = draw(st.integers(1, 4)), draw(st.integers(1, largest))
    call: dict[str, Any] = {
        "scores": draw(scores(2, 2, nq, nk)),
        "block_q": block_q,
        "block_k": block_k,
        "q_len": draw(st.integers((nq - 1) * block_q + 1, nq * block_q)),
        "kv_len": draw(st.integers((nk - 1) * block_k + 1, nk * block_k)),
        "keep_own": draw(st.booleans()),
    }
    for name, count in (("forced_q", nq), ("forced_k", nk), ("partial_k", nk), ("empty_k", nk)):
        lead = draw(st.sampled_from((None, (), (2,), (1,), (2, 2), (1, 2))))
        if lead is not None:
            call[name] = draw(booleans(*lead, count))
    return call


def assert_sound(mask: BlockMask, call: dict[str, Any]) -> None:
    """Counts and ids in range, no block twice, none that is empty, and no row without a block that could have one."""
    nq, nk = call["scores"].shape[2:]
    for b in range(2):
        for h in range(2):
            alive = {j for j in range(nk) if not at(call.get("empty_k"), b, h, j)}
            for i in range(nq):
                count, full = int(mask.kv_num_blocks[b, h, i]), int(mask.kv_num_full[b, h, i])
                listed = mask.kv_indices[b, h, i, :count].tolist()
                assert 0 <= full <= count <= nk
                assert len(set(listed)) == count
                assert set(listed) <= alive
                assert listed or not alive


@given(calls(), shares)
def test_the_best_share_is_that_of_the_definition(call: dict[str, Any], density: float):
    mask = select_blocks(**call, density=density, backend="torch")
    assert_sound(mask, call)
    assert_lists(mask, loop_select(**call, density=density))


@given(calls(), st.lists(shares, min_size=4, max_size=4))
def test_a_share_for_every_head(call: dict[str, Any], each: Sequence[float]):
    density = torch.tensor(each, dtype=torch.float64).view(2, 2)
    mask = select_blocks(**call, density=density, backend="torch")
    assert_sound(mask, call)
    assert_lists(mask, loop_select(**call, density=density))


def clamped(score: float) -> float:
    """NaN last, and infinities as the largest numbers: a softmax of them is defined."""
    return -3.4e38 if math.isnan(score) else min(max(score, -3.4e38), 3.4e38)


@given(calls(), shares)
def test_the_fewest_blocks_reach_the_mass(call: dict[str, Any], top_p: float):
    call = {**call, "keep_own": False, "forced_q": None}
    mask = select_blocks(**call, top_p=top_p, backend="torch")
    assert_sound(mask, call)
    kept = mask.to_dense()
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(kept.shape[2])).tolist():
        row = [clamped(float(score)) for score in call["scores"][b, h, i]]
        free = [
            j for j in range(len(row)) if not (at(call.get("forced_k"), b, h, j) or at(call.get("empty_k"), b, h, j))
        ]
        ranked = sorted(free, key=lambda j: (-row[j], j))
        chosen = [j for j in ranked if kept[b, h, i, j]]
        assert chosen == ranked[: len(chosen)], "the best ones"
        if ranked:
            weights = [math.exp(row[j] - row[ranked[0]]) for j in ranked]
            before, after = sum(weights[: len(chosen) - 1]), sum(weights[: len(chosen)])
            # Weights are integers of 28 bits, the share has six digits.
            slack = 1e-6 * sum(weights)
            assert after >= top_p * sum(weights) - slack
            assert before < top_p * sum(weights) + slack


def assert_same(one: BlockMask, other: BlockMask) -> None:
    assert torch.equal(one.kv_num_blocks, other.kv_num_blocks)
    assert torch.equal(one.kv_num_full, other.kv_num_full)
    slot = torch.arange(max(one.kv_indices.shape[-1], other.kv_indices.shape[-1]))
    lists = [torch.nn.functional.pad(m.kv_indices, (0, len(slot) - m.kv_indices.shape[-1])) for m in (one, other)]
    unlisted = slot >= one.kv_num_blocks[..., None]
    assert torch.equal(lists[0].masked_fill(unlisted, 0), lists[1].masked_fill(unlisted, 0))


@times(1 / 4)
@given(calls(5), st.one_of(st.none(), shares), st.one_of(st.none(), shares))
def test_the_kernel_lists_the_same_blocks(call: dict[str, Any], density: float | None, top_p: float | None):
    pytest.importorskip("triton")
    if density is None and top_p is None:
        density = 0.5
    masks = [select_blocks(**call, density=density, top_p=top_p, backend=backend) for backend in ("torch", "triton")]
    assert_same(*masks)


@times(1 / 2)
@given(scores(1, 2, 3, 5), shares, st.booleans())
def test_a_threshold_on_any_gates_keeps_own_pairs_and_no_closed_one(
    gates: torch.Tensor, threshold: float, closed: bool
):
    geometry = {"block_q": 32, "block_k": 16, "seq_len": 75}
    open_k = torch.tensor([True, False, True, True, not closed]) if closed else None
    chosen = select_by_threshold(gates, threshold, open_k=open_k, backend="torch", **geometry)
    own = own_blocks(32, 16, 75, 75, CPU)
    allowed = torch.ones(5, dtype=torch.bool) if open_k is None else open_k
    assert not chosen[..., ~allowed].any()
    assert chosen[..., own & allowed].all()


# Fields that suit grids of a hundred tokens.
SMALL: dict[str, Any] = {"block": (32, 32), "window": (1.0, 0.5, 0.5), "tile": (2, 2, 2), "radius": 2.0, "min_width": 4}


def small(kind: type[Any]) -> Any:
    fields = {field.name for field in dataclasses.fields(kind)}
    window = {"window": (1, 3, 3)} if kind is TileWindow else {}  # it counts tiles
    return kind(**{name: value for name, value in (SMALL | window).items() if name in fields})


KINDS = [kind for name, kind in SELECTS.items() if name != "dense"]


@given(st.sampled_from(KINDS), layouts(5), seeds, st.sampled_from(("q", "k")), odd_numbers, st.booleans())
def test_every_selection_survives_odd_numbers(
    kind: type[Any], layout: TokenLayout, seed: int, which: str, odd: float, hidden: bool
):
    """A NaN or infinity among queries or keys: a latent block still reads itself, and text all and is read by all."""
    select = small(kind)
    layout = layout.without_references() if select.is_static else layout
    q, k = normal(seed, 2, 2, layout.seq_len, 2, 8)
    {"q": q, "k": k}[which][0, seed % layout.seq_len, 0, 3] = odd
    key_mask = None
    if hidden:
        key_mask = torch.ones(2, layout.seq_len, dtype=torch.bool)
        key_mask[1, seed % layout.seq_len :] = False
    blocks = SequenceBlocks(layout, None, *select.block, CPU)
    mask = select.select(blocks, select.prepare(blocks), gated(call_of(q, k, key_mask=key_mask), select), LayerMemory())
    keep = mask.to_dense().expand(2, 2, -1, -1)
    empty = (
        torch.zeros(2, 1, blocks.num_blocks[1], dtype=torch.bool) if key_mask is None else blocks.hidden_k(key_mask)[1]
    )
    must = own_blocks(*select.block, layout.seq_len, layout.seq_len, CPU).expand_as(keep)
    if blocks.forced_q is not None and blocks.forced_k is not None:
        must = must | blocks.forced_q[..., None] | blocks.forced_k[..., None, :]
    assert not (keep & empty[..., None, :]).any()
    assert (keep | empty[..., None, :])[must].all()
    assert int(mask.kv_num_blocks.max()) <= blocks.num_blocks[1]
    assert (mask.kv_num_full <= mask.kv_num_blocks).all()


@given(st.sampled_from(KINDS), layouts(5), seeds, odd_numbers)
def test_what_hidden_keys_hold_does_not_matter(kind: type[Any], layout: TokenLayout, seed: int, odd: float):
    select = small(kind)
    layout = layout.without_references() if select.is_static else layout
    q, k = normal(seed, 2, 2, layout.seq_len, 2, 8)
    key_mask = normal(seed, 2, layout.seq_len) > -0.5
    odd_k = torch.where(key_mask[..., None, None], k, odd)
    blocks = SequenceBlocks(layout, None, *select.block, CPU)
    calls = [gated(call_of(q, one, key_mask=key_mask), select) for one in (k, odd_k)]
    found = [select.select(blocks, select.prepare(blocks), call, LayerMemory()) for call in calls]
    assert_same(*found)
