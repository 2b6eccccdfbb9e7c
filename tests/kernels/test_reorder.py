"""Copies in permuted order, whole and a few heads at a time."""

import pytest
import torch

pytest.importorskip("triton")

from dit_accel.kernels.reorder import heads_at_once, reorder_pair

from .oracle import permute


@pytest.mark.parametrize(
    ("batch", "heads", "share", "together"),
    [(1, 12, 0.5, 12), (1, 12, 0.15, 3), (2, 12, 0.15, 6), (2, 12, 0.5, 12), (1, 40, 0.15, 10), (1, 5, 0.2, 2)],
)
def test_heads_at_once_fit_the_share_in_even_parts(batch, heads, share, together):
    assert heads_at_once(batch, heads, share) == together
    assert 2 * together / (4 * batch * heads) <= share
    assert heads_at_once(batch, heads, 1e-3) == 1


@pytest.mark.parametrize(
    ("query_blocks", "share", "together"), [(256, None, 12), (591, None, 3), (256, 0.15, 3), (591, 0.5, 12)]
)
def test_a_copy_keeps_to_its_share_where_its_parts_are_large(query_blocks, share, together):
    from dit_accel.kernels.hopper.forward import heads_of_a_copy

    assert heads_of_a_copy(1, 12, query_blocks, 132, share) == together


@pytest.mark.parametrize("lead", [(1, 1), (1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("first", [0, 1])
def test_some_heads_are_moved_to_a_buffer(first, lead, device):
    torch.manual_seed(0)
    a, b = (torch.randn(2, 3, 203, 40).half().transpose(1, 2) for _ in range(2))
    rows = torch.rand(*lead, 203).argsort(-1).to(torch.int32)
    expected = [permute(x.transpose(1, 2), rows).transpose(1, 2) for x in (a, b)]
    a, b, rows = (x.to(device) for x in (a, b, rows))
    whole = reorder_pair(a, b, rows)
    assert all(torch.equal(x.cpu(), y) for x, y in zip(whole, expected, strict=True))
    out = torch.full((2, 2, 203, 2, 40), torch.nan, dtype=torch.float16, device=device)
    moved = reorder_pair(a, b, rows, first=first, out=out)
    assert moved is out
    assert all(torch.equal(x.cpu(), y[:, :, first : first + 2]) for x, y in zip(out, expected, strict=True))
