"""What a ring cuts from a kept plan: once, as bits, and never what another plan, ring or mask had; and in which order
it sends, cuts, attends and merges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import pytest
import torch

from dit_accel.call import AttentionCall
from dit_accel.kept_plans import KeptPlan
from dit_accel.kernels import BlockMask
from dit_accel.kernels.mask import packed
from dit_accel.kernels.mask.packed import PackedBlockMask
from dit_accel.layout import StepContext, TokenLayout
from dit_accel.plan import AttentionPlan
from dit_accel.ring import RingPart, RingShard
from dit_accel.ring_attention import attend_around, mask_of_own_keys, masks_around, shares_of_work

LAYOUT = TokenLayout((1, 10, 20), 0, 200)


def _keep(seed: int, nq: int = 7) -> torch.Tensor:
    return torch.rand(1, 2, nq, 13, generator=torch.Generator().manual_seed(seed)) < 0.4


def _call(world: int, rank: int, work: torch.Tensor | None = None, captured: bool = False) -> AttentionCall:
    """A call of a process' slots; nothing is exchanged."""
    ring = RingShard(None, rank, (100, 100) if world == 2 else (90, 60, 50), None, "test")
    part = RingPart.of(ring, None, torch.ones(7) if work is None else work, (32, 16), torch.device("cpu"))
    x = torch.zeros(1, 1, 2, 8)
    return AttentionCall(0, StepContext(), x, x, x, None, 1.0, LAYOUT, ring=ring, part=part, captured=captured)


def _plan(keep: torch.Tensor) -> AttentionPlan:
    return AttentionPlan(None, BlockMask.from_dense(keep, 32, 16, 200, 200))


def _assert_cut(call: AttentionCall, mask_of: Callable[[int], BlockMask], keep: torch.Tensor) -> None:
    part = call.part
    assert part is not None
    for rank in range(part.ring.size):
        found = mask_of(rank)
        assert torch.equal(found.to_dense(), keep[:, :, part.q_span(), part.k_span(rank)])
        # Of 200 keys in blocks of 16 the last is short, and nothing else is masked.
        partial = torch.zeros_like(keep)
        partial[..., -1] = keep[..., -1]
        assert torch.equal(found.partial_to_dense(), partial[:, :, part.q_span(), part.k_span(rank)])
        assert found.kv_len == part.key_slots(rank)


@contextmanager
def _counted() -> Iterator[mock.Mock]:
    with mock.patch.object(BlockMask, "parts", autospec=True, side_effect=BlockMask.parts) as cuts:
        yield cuts


@pytest.mark.parametrize("world", [2, 3])
def test_a_kept_plan_is_cut_once(world):
    keep, call = _keep(0), _call(world, 1)
    plan = _plan(keep)
    with _counted() as cuts:
        kept = KeptPlan.of(call, plan)
        _assert_cut(call, masks_around(call, plan), keep)
        for _ in range(3):
            _assert_cut(call, masks_around(call, kept.plan), keep)
        assert cuts.call_count == 1
        # What else asks for a cut of the same mask gets its own, once.
        for _ in range(2):
            again = kept.plan
            assert again.shares is not None
            own = mask_of_own_keys(call, again.shares.blocks, lambda again=again: again.mask)
            assert torch.equal(own.to_dense(), keep[..., call.part.k_span(1)])
        assert cuts.call_count == 2


def test_a_plan_that_is_not_kept_leaves_nothing():
    keep, call = _keep(0), _call(2, 0)
    plan = _plan(keep)
    with _counted() as cuts:
        for _ in range(2):
            _assert_cut(call, masks_around(call, plan), keep)
    assert cuts.call_count == 2
    assert plan.shares is None


def test_another_plan_another_ring_and_other_bounds_are_cut_anew():
    first, second = _keep(0), _keep(1)
    call = _call(2, 0)
    kept = KeptPlan.of(call, _plan(first))
    _assert_cut(call, masks_around(call, kept.plan), first)
    _assert_cut(call, masks_around(call, KeptPlan.of(call, _plan(second)).plan), second)
    uneven = torch.tensor([8.0, 1, 1, 1, 1, 1, 1])
    for other in (_call(2, 1), _call(3, 0), _call(3, 2), _call(2, 0, uneven), call):
        _assert_cut(other, masks_around(other, kept.plan), first)


def test_a_plan_narrowed_for_one_call_does_not_read_what_the_kept_one_has():
    keep, call = _keep(0), _call(2, 0)
    kept = KeptPlan.of(call, _plan(keep))
    _assert_cut(call, masks_around(call, kept.plan), keep)
    runs = torch.zeros(1, 2, 7, dtype=torch.bool)
    runs[:, 0] = True
    narrow = replace(kept.plan, kept=kept.plan.mask.for_queries(runs), share=None)
    assert narrow.shares is None
    _assert_cut(call, masks_around(call, narrow), keep & runs[..., None])
    assert torch.equal(shares_of_work(call, narrow), shares_of_work(call, _plan(keep & runs[..., None])))
    _assert_cut(call, masks_around(call, kept.plan), keep)


def test_cuts_are_kept_as_bits_and_small_lists_beside_them():
    keep, call = _keep(0), _call(2, 0)
    for most, unpacked in ((packed.SMALL_LISTS, 2), (0, 6)):
        kept = KeptPlan.of(call, _plan(keep))
        with (
            mock.patch.object(packed, "SMALL_LISTS", most),
            mock.patch.object(
                PackedBlockMask, "_unpacked", autospec=True, side_effect=PackedBlockMask._unpacked
            ) as lists,
        ):
            # The first cut reads the whole mask.
            _assert_cut(call, masks_around(call, kept.plan), keep)
            lists.reset_mock()
            for _ in range(3):
                mask_of = masks_around(call, kept.plan)
                assert [mask_of(rank).kv_len for rank in range(2)] == [call.part.key_slots(rank) for rank in range(2)]
            assert lists.call_count == unpacked
        cut = [one for part in kept.shares.blocks._cut.values() for one in part]
        assert all(isinstance(one, PackedBlockMask) for one in cut)
        # A bit a pair of blocks of this process' queries, each run of keys rounded up to a byte.
        assert sum(one.kept.nbytes for one in cut) == 2 * call.part.q_counts[0] * 2
        assert all(one.partial is None for one in cut)


def test_a_captured_graph_leaves_nothing_and_finds_what_was_there():
    keep = _keep(0)
    captured = _call(2, 0, captured=True)
    kept = KeptPlan.of(_call(2, 0), _plan(keep))
    _assert_cut(captured, masks_around(captured, kept.plan), keep)
    shares_of_work(captured, kept.plan)
    assert not kept.shares.blocks._cut
    assert not kept.shares.work
    _assert_cut(_call(2, 0), masks_around(_call(2, 0), kept.plan), keep)
    with _counted() as cuts:
        _assert_cut(captured, masks_around(captured, kept.plan), keep)
    assert cuts.call_count == 0


def test_what_inference_cut_serves_a_training():
    keep, call = _keep(0), _call(2, 0)
    kept = KeptPlan.of(call, _plan(keep))
    with torch.inference_mode():
        masks_around(call, kept.plan)(0)
        masks_around(call, kept.plan)(0)  # unpacked, small lists to stay
        shares_of_work(call, kept.plan)
    (cut,) = kept.shares.blocks._cut.values()
    assert isinstance(cut[0], PackedBlockMask)
    assert not cut[0].kept.is_inference()
    assert not masks_around(call, kept.plan)(0).kv_indices.is_inference()
    assert not shares_of_work(call, kept.plan).is_inference()
    assert not kept.plan.mask.kv_indices.is_inference()  # whole, as the first cut read it


def test_shares_of_work_are_worked_out_once():
    keep, call = _keep(0), _call(3, 0)
    kept = KeptPlan.of(call, _plan(keep))
    found = shares_of_work(call, kept.plan)
    bounds = call.part.q_blocks
    expected = [keep[:, :, first:last].float().mean() for first, last in pairwise(bounds)]
    assert torch.allclose(found, torch.stack(expected), atol=1e-6)
    assert shares_of_work(call, kept.plan) is found
    other = _call(2, 0)
    assert shares_of_work(other, kept.plan).shape == (2,)


class _Arrives:
    def __init__(self, held: Sequence[torch.Tensor]) -> None:
        self.held = held

    def arrived(self) -> Sequence[torch.Tensor]:
        return self.held


def test_keys_are_sent_before_blocks_are_cut_and_parts_are_rounded_once():
    """Three processes; what each part gives is told, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    call = _call(3, 1)
    done = []
    parts = [torch.randn(1, 64, 2, 8, generator=generator).bfloat16() for _ in range(3)]
    lses = [torch.randn(1, 2, 64, generator=generator) for _ in range(3)]
    call.q = torch.zeros(1, 64, 2, 8, dtype=torch.bfloat16)
    call.k = call.v = torch.zeros(1, call.part.key_slots(1), 2, 8, dtype=torch.bfloat16)

    def send(_ring: RingShard, own: Sequence[torch.Tensor], tokens: int) -> _Arrives:
        done.append(("send", own[0].shape[1], tokens))
        return _Arrives([x.new_zeros(1, tokens, 2, 8) for x in own])

    def mask_of(rank: int) -> BlockMask:
        done.append(("cut", rank))
        return BlockMask.from_dense(torch.ones(1, 1, 2, 1, dtype=torch.bool), 32, 64, 64, 64)

    order = iter((1, 0, 2))  # from the process before

    def attend(here: AttentionCall, _plan: AttentionPlan) -> tuple[torch.Tensor, torch.Tensor]:
        rank = next(order)
        assert here.k.shape[1] == call.part.key_slots(rank)
        done.append(("attend", rank))
        return parts[rank].clone(), lses[rank].clone()

    with mock.patch.object(RingShard, "send", send):
        out, lse = attend_around(call, mask_of, attend)
    slots = [call.part.key_slots(rank) for rank in range(3)]
    assert done == [
        ("send", slots[1], slots[0]), ("cut", 1), ("attend", 1),
        ("send", slots[0], slots[2]), ("cut", 0), ("attend", 0),
        ("cut", 2), ("attend", 2),
    ]  # fmt: skip
    weights = torch.stack(lses).double().softmax(0).transpose(2, 3)[..., None]
    exact = (weights * torch.stack(parts).double()).sum(0)
    assert torch.allclose(lse.double(), torch.stack(lses).double().logsumexp(0), atol=1e-6)
    assert out.dtype == torch.bfloat16
    # Half a unit in the last place, and what float32 adds before it.
    bound = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 16 * torch.finfo(torch.float32).eps
    assert bool(((out.double() - exact).abs() <= bound).all())
