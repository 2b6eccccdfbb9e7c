"""Who attends which blocks around a ring."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import pytest
import torch

from dit_accel.patches.shards import places_of
from dit_accel.ring import RingPart, RingShard, shared_out


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_work_is_shared_out_evenly_and_nobody_is_left_out(parts):
    generator = torch.Generator().manual_seed(parts)
    work = torch.rand(40, generator=generator)
    work[-3:] = 8.0  # rows of text
    bounds = shared_out(work, parts)
    assert bounds[0] == 0
    assert bounds[-1] == 40
    shares = [float(work[first:last].sum()) for first, last in pairwise(bounds)]
    assert all(share > 0 for share in shares)
    # A bound is the nearest: a share misses its part by one block's work at most.
    assert max(shares) - float(work.sum()) / parts <= float(work.max()) + 1e-5
    assert shared_out(torch.tensor([100.0, 0.0, 0.0]), 3) == (0, 1, 2, 3)


def test_a_ring_of_more_processes_than_blocks_is_refused():
    ring = RingShard(None, 0, (16, 16, 16), None, "test")
    with pytest.raises(ValueError, match="1 query and 2 key blocks cannot be shared by ring_degree=3"):
        RingPart.of(ring, None, torch.ones(1), (64, 32), torch.device("cpu"))


def test_places_of_tokens_are_made_once_and_serve_a_training_behind_an_inference():
    device = torch.device("cpu")
    places_of.cache_clear()
    with torch.inference_mode():
        there, back = places_of((3, 5), 2, device)
    # Text 0 to 2 and latents 3 to 7; the first process has the longer parts.
    assert back.tolist() == [0, 1, 3, 4, 5, 2, 6, 7]
    assert [back.tolist().index(token) for token in range(8)] == there.tolist()
    assert places_of((3, 5), 2, device)[0] is there
    x = torch.arange(8.0, requires_grad=True)
    (x[there] * torch.arange(8.0)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[there], torch.arange(8.0))


@pytest.mark.parametrize("per_head", [False, True])
def test_only_tokens_that_change_hands_are_sent(per_head):
    generator = torch.Generator().manual_seed(0)
    # A few of 64 tokens change their places with others, in each head or in all heads alike.
    slots = torch.arange(64).repeat(3 if per_head else 1, 1)
    for row in slots:
        first, second = torch.randperm(64, generator=generator)[:12].chunk(2)
        row[first], row[second] = row[second].clone(), row[first].clone()
    rings = [RingShard(None, rank, (40, 24), None, "test") for rank in range(2)]
    given = slots if per_head else slots[0]
    keys = [RingPart.of(ring, given, torch.ones(4), (16, 16), torch.device("cpu")).keys for ring in rings]
    x = torch.randn(2, 64, 3, 4, generator=generator)
    own = [x[:, :40], x[:, 40:]]
    # Of the first 40 tokens those at slots of the second half, and of the others those at slots of the first.
    there, here = (slots[:, 32:] < 40).sum(), (slots[:, :32] >= 40).sum()
    heads = 1 if per_head else 3
    packed: list[torch.Tensor] = []

    def pack(out: torch.Tensor, sent: torch.Tensor, came: list[int], counts: list[int], **_: object) -> mock.Mock:
        rank = len(packed)
        assert counts == ([0, int(there)] if rank == 0 else [int(here), 0])
        assert came == ([0, int(here)] if rank == 0 else [int(there), 0])
        assert out.shape[1] == sent.shape[1] == heads * 2 * 4
        packed.append(sent)
        return mock.Mock()

    with mock.patch("torch.distributed.all_to_all_single", pack):
        for exchange, tokens in zip(keys, own, strict=True):
            exchange.there(tokens)
    # The same again, now that it is known what comes.
    arrive = iter(packed[::-1])

    def unpack(out: torch.Tensor, *_: object, **__: object) -> mock.Mock:
        out.copy_(next(arrive))
        return mock.Mock()

    with mock.patch("torch.distributed.all_to_all_single", unpack):
        found = torch.cat([exchange.there(tokens) for exchange, tokens in zip(keys, own, strict=True)], 1)
    wanted = torch.stack([x[:, slots[head if per_head else 0], head] for head in range(3)], 2)
    assert torch.equal(found, wanted)
