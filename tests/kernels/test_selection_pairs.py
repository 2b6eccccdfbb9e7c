"""Scores, masses and choices of blocks where queries see different keys: what is hidden does not count."""

from __future__ import annotations

import math

import pytest
import torch

from dit_accel import Recipe
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.kernels import block_sparse_attention
from dit_accel.kernels.mask.pairs import PairMask
from dit_accel.kernels.selection import pairs as under
from dit_accel.kernels.selection.api import pooled_scores, select_blocks
from dit_accel.kernels.selection.block_mass import block_mass, strided_block_mass
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.stages.order.simple import Raster
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.gate import GlobalGate
from dit_accel.stages.select.mass import FrozenMass, Mass
from dit_accel.stages.select.pooled import Pooled
from dit_accel.stages.select.rectified import Reallocated
from dit_accel.stages.select.sampled import Sampled
from dit_accel.stages.select.similarity_gate import GatedPooled
from tests.calls import attend

S, BLOCK_Q, BLOCK_K = 205, 64, 32
NQ, NK = math.ceil(S / BLOCK_Q), math.ceil(S / BLOCK_K)


def case(seed: int, lead: tuple[int, int], permuted: bool):
    """q, k ``[2, S, 2, 16]``, float32; a mask with whole, partial and hidden blocks and a blind query; rows."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, S, 2, 16, generator=g) * 2 for _ in range(2))
    order = torch.argsort(torch.rand(2, 2, S, generator=g), -1) if permuted else None
    place = torch.arange(S)
    seen = (place[None] <= place[:, None]) | (torch.rand(*lead, S, S, generator=g) > 0.999)
    seen = seen & (place[None] // 50 != 1)  # keys that nobody sees
    seen[..., 7, :] = False
    if order is not None:
        # Of the permuted sequence, so that its blocks are whole, partial and hidden.
        back = order.argsort(-1)
        seen = seen.expand(2, 2, S, S).take_along_dim(back[..., None], 2).take_along_dim(back[..., None, :], 3)
    # Keys that nobody sees please every query: counted, they would leave nothing to the others.
    unseen = ~seen.any(-2).expand(2, 2, S).transpose(1, 2)
    k = torch.where(unseen[..., None], 8 * q.mean(1, keepdim=True).sign(), k)
    return q, k, seen, None if order is None else order.to(torch.int32)


def in_blocks(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Token pairs ``[B, H, S, S]`` in the slots' order, as ``[B, H, nq, nk, block_q, block_k]``, padded with 0."""
    if rows is not None:
        index = rows.long().expand(*x.shape[:2], -1)
        x = x.take_along_dim(index[..., None], 2).take_along_dim(index[..., None, :], 3)
    x = torch.nn.functional.pad(x, (0, -S % BLOCK_K, 0, -S % BLOCK_Q))
    return x.unflatten(3, (-1, BLOCK_K)).unflatten(2, (-1, BLOCK_Q)).transpose(3, 4)


CASES = pytest.mark.parametrize("permuted", [False, True], ids=["raster", "permuted"])
LEADS = pytest.mark.parametrize("lead", [(1, 1), (2, 1), (1, 2)], ids=str)


@CASES
@LEADS
@pytest.mark.parametrize("at_a_time", [1, 1 << 24])
def test_scores_and_masses_are_those_of_the_pairs_that_are_seen(permuted, lead, at_a_time, monkeypatch):
    monkeypatch.setattr(under, "LOGITS_AT_A_TIME", at_a_time)
    q, k, pairs, rows = case(0, lead, permuted)
    seen = PairMask.of(pairs, rows, BLOCK_Q, BLOCK_K)
    assert {0, 1} == set(seen.whole.unique().tolist())
    assert bool((seen.bit_rows >= 0).any())
    assert not seen.visible.all()
    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * 0.25
    shown = pairs.expand(2, 2, S, S)
    logits = logits.masked_fill(~shown, 0.0)
    total, count = in_blocks(logits, rows).sum((-1, -2)), in_blocks(shown.double(), rows).sum((-1, -2))
    expected = (total / count.clamp_min(1)).float()
    # A sum of at most 16 x 2048 products of about 4: eps times its length, halved by each rounding's sign.
    found = pooled_scores(q, k, BLOCK_Q, BLOCK_K, rows=rows, scale=0.25)
    found = under.pooled_scores_under(found, q, k, seen, rows=rows, scale=0.25)
    assert (found - expected).abs().max() <= 16 * torch.finfo(torch.float32).eps * logits.abs().max()

    shares = logits.masked_fill(~shown, -torch.inf).softmax(-1).nan_to_num(0.0)
    expected = in_blocks(shares, rows).sum((-1, -2))
    _, lse = block_sparse_attention(q, k, k, seen.blocks(S), rows=rows, scale=0.25, return_lse=True)
    for backend, given in (("torch", None), ("torch", lse), ("triton", lse)):
        mass, found = block_mass(
            q, k, block_q=BLOCK_Q, block_k=BLOCK_K, lse=given, rows=rows, seen=seen, scale=0.25, backend=backend
        )
        # Of a share near 1 the logit's rounding, some 16 units of its last place, is the relative error.
        assert (mass - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * BLOCK_Q
        assert bool((mass[count == 0] == 0).all())
        wanted = logits.masked_fill(~shown, -torch.inf).logsumexp(-1)
        blind = wanted == -torch.inf
        assert torch.equal(found == -torch.inf, blind)
        assert (found - wanted)[~blind].abs().max() <= 64 * torch.finfo(torch.float32).eps * wanted[~blind].abs().max()


@CASES
@LEADS
def test_masses_of_a_sample_are_those_of_the_pairs_that_are_seen(permuted, lead):
    q, k, pairs, rows = case(1, lead, permuted)
    seen = PairMask.of(pairs, rows, BLOCK_Q, BLOCK_K)
    shown = pairs.expand(2, 2, S, S)
    logits = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * 0.25
    shares = logits.masked_fill(~shown, -torch.inf).softmax(-1).nan_to_num(0.0)
    sampled = torch.arange(BLOCK_Q) % 2 == 0
    expected = (in_blocks(shares, rows) * sampled[:, None]).sum((-1, -2)) * 2
    last = (S - 1) % BLOCK_Q + 1
    expected[:, :, -1] *= last / (2 * -(-last // 2))
    _, lse = block_sparse_attention(q, k, k, seen.blocks(S), rows=rows, scale=0.25, return_lse=True)
    for backend, given in (("torch", None), ("torch", lse), ("triton", lse)):
        mass = strided_block_mass(
            q, k, block_q=BLOCK_Q, block_k=BLOCK_K, query_stride=2, lse=given, rows=rows, seen=seen, scale=0.25,
            backend=backend,
        )  # fmt: skip
        assert (mass - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * BLOCK_Q


def test_what_the_masses_cannot_do_is_said():
    q, k, pairs, _ = case(0, (1, 1), False)
    seen = PairMask.of(pairs, None, BLOCK_Q, BLOCK_K)
    sizes = {"block_q": BLOCK_Q, "block_k": BLOCK_K, "seen": seen}
    with pytest.raises(ValueError, match="takes a key_mask or the pairs that are seen, got both"):
        block_mass(q, k, **sizes, key_mask=torch.ones(2, S, dtype=torch.bool))
    with pytest.raises(ValueError, match="on Triton needs the log-sum-exp of what is seen, got none"):
        block_mass(q, k, **sizes, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("by", ["density", "top_p", "both"])
def test_hidden_blocks_are_no_candidates(backend, by, device):
    g = torch.Generator().manual_seed(1)
    scores = torch.randn(2, 2, NQ, NK, generator=g)
    hidden = torch.rand(2, 1, NQ, NK, generator=g) > 0.5
    hidden[0, 0, 1] = True  # a row without any
    forced_k, empty_k = torch.zeros(2, NK, dtype=torch.bool)
    forced_k[2], empty_k[4] = True, True
    shares = {"density": {"density": 0.4}, "top_p": {"top_p": 0.6}, "both": {"density": 0.4, "top_p": 0.6}}[by]
    mask = select_blocks(
        scores.to(device), block_q=BLOCK_Q, block_k=BLOCK_K, q_len=S, kv_len=S, hidden=hidden.to(device),
        forced_k=forced_k.to(device), empty_k=empty_k.to(device), keep_own=False, backend=backend, **shares,
    ).to_dense().cpu()  # fmt: skip
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(NQ)).tolist():
        ranked = sorted(
            (j for j in range(NK) if not (hidden[b, 0, i, j] or forced_k[j] or empty_k[j])),
            key=lambda j, row=scores[b, h, i]: -float(row[j]),
        )
        kept = set()
        if "density" in shares:
            kept |= set(ranked[: math.ceil(0.4 * len(ranked))])
        if "top_p" in shares and ranked:
            weights = scores[b, h, i].double()[ranked].softmax(0)
            kept |= set(ranked[: 1 + int((weights.cumsum(0) < 0.6).sum())])
        if not hidden[b, 0, i, 2]:
            kept.add(2)
        assert set(mask[b, h, i].nonzero().flatten().tolist()) == kept


def test_a_mask_of_hidden_blocks_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"hidden must be bool \[B, H, 4, 7\], got \(1, 1, 7, 4\)"):
        select_blocks(
            torch.zeros(1, 1, NQ, NK), block_q=BLOCK_Q, block_k=BLOCK_K, q_len=S, kv_len=S, density=0.5,
            hidden=torch.zeros(1, 1, NK, NQ, dtype=torch.bool),
        )  # fmt: skip


LAYOUT = TokenLayout((2, 16, 16), 0, 512)
BLOCK = (64, 32)


def planned(select, q, k, pairs):
    """The blocks that an engine keeps, bool ``[B, H, nq, nk]``."""
    engine = Engine(Recipe(Raster(), select, schedule=Schedule(dense_fraction=0.0)), ["layer"], "auto", 0)
    calls = []
    engine.observer = calls.append
    attend(engine, 0, AttentionInputs(q, k, k, pairs), LAYOUT, StepContext(), lambda: pytest.fail("ran dense"))
    return calls[0].plan.mask.to_dense().expand(1, 2, 8, 16)


def packed_in_halves():
    """q, k, and a mask of two images of one sequence, whose keys please the queries of the other."""
    g = torch.Generator().manual_seed(2)
    half = torch.arange(512) < 256
    q, k = (torch.randn(1, 512, 2, 16, generator=g) for _ in range(2))
    q[:, half, :, 0] = k[:, ~half, :, 0] = 9.0
    q[:, ~half, :, 1] = k[:, half, :, 1] = 9.0
    return q, k, half


SELECTS = [
    Pooled(density=0.5, block=BLOCK),
    Mass(density=0.5, head_adaptive=False, block=BLOCK),
    FrozenMass(density=0.5, block=BLOCK),
    Sampled(density=0.5, top_p=None, block=BLOCK),
    GatedPooled(density=0.5, top_p=None, similarity=-1.0, smooth_k=False, block=BLOCK),
    Reallocated(density=0.5, top_p=0.01, neighbours=0, sink_first_frame=False, block=BLOCK),
]


@pytest.mark.parametrize("select", SELECTS, ids=lambda select: type(select).__name__)
def test_a_density_is_of_the_blocks_that_are_seen(select):
    """Half of what is seen: of 8 key blocks 4, or 5 where none of them is the query block's own."""
    q, k, half = packed_in_halves()
    kept = planned(select, q, k, half[:, None] == half)
    side_q, side_k = half[::64], half[::32]
    assert not (kept & (side_q[:, None] != side_k)).any()
    assert set(kept.sum(-1).flatten().tolist()) <= {4, 5, 6}


@pytest.mark.parametrize("select", [SELECTS[0], SELECTS[1], SELECTS[2]], ids=lambda select: type(select).__name__)
def test_each_side_is_planned_as_if_it_were_alone(select):
    q, k, half = packed_in_halves()
    kept = planned(select, q, k, half[:, None] == half)
    layout = TokenLayout((1, 16, 16), 0, 256)
    for side, rows, columns in ((half, slice(0, 4), slice(0, 8)), (~half, slice(4, 8), slice(8, 16))):
        engine = Engine(Recipe(Raster(), select, schedule=Schedule(dense_fraction=0.0)), ["layer"], "auto", 0)
        calls = []
        engine.observer = calls.append
        inputs = AttentionInputs(q[:, side], k[:, side], k[:, side])
        attend(engine, 0, inputs, layout, StepContext(), lambda: pytest.fail("ran dense"))
        assert torch.equal(kept[:, :, rows, columns], calls[0].plan.mask.to_dense())


def test_a_gate_counts_what_is_seen_alone():
    q, k, half = packed_in_halves()
    kept = planned(GlobalGate(threshold=0.25, block=BLOCK), q, k, half[:, None] == half)
    # Hidden pairs have the largest gates: counted, they would fill the threshold, and nothing but its own be kept.
    own = torch.arange(16) // 2 == torch.arange(8)[:, None]
    assert bool((kept & ~own).any())
    assert not (kept & (half[::64][:, None] != half[::32])).any()
