"""Attention to parts of the keys, put together: what attention to all of them gives."""

from __future__ import annotations

import pytest
import torch

from dit_accel.kernels.attention.merge import merge_attention
from dit_accel.kernels.mask.block_mask import BlockMask


def _parts(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Output and log-sum-exp over all keys, and over each of three parts, in float64; some rows see none of one."""
    q, k, v = (torch.randn(2, 3, 70, 12, dtype=torch.float64, generator=generator) for _ in range(3))
    seen = torch.rand(2, 3, 70, 70, generator=generator) < 0.3
    seen[:, :, 5] = False  # nothing at all
    seen[:, :, 6, :30] = False  # nothing of the first part
    seen[:, :, 7, 30:] = False  # of the first part alone
    logits = (4 * q @ k.transpose(-1, -2)).masked_fill(~seen, -torch.inf)

    def over(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        weights = logits[..., keys].softmax(-1).nan_to_num(0.0)
        return (weights @ v[:, :, keys]).transpose(1, 2), logits[..., keys].logsumexp(-1)

    return *over(slice(None)), [over(keys) for keys in (slice(0, 30), slice(30, 31), slice(31, None))]


@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)]
)
def test_parts_make_the_whole(backend, dtype, device):
    out, lse, parts = _parts(torch.Generator().manual_seed(0))
    found, found_lse = (x.to(device, dtype).contiguous() for x in parts[0])
    for part, part_lse in parts[1:]:
        given = (part.to(device, dtype), part_lse.to(device, dtype))
        found, found_lse = merge_attention(found, found_lse, *given, backend=backend)
    # Outputs are of unit size; each merge rounds two exponentials, two products and a sum.
    bound = 16 * torch.finfo(dtype).eps
    assert float((found.double().cpu() - out).abs().max()) < bound * float(out.abs().max())
    assert torch.equal(found_lse.cpu() == -torch.inf, lse == -torch.inf)
    seen = lse > -torch.inf
    assert float((found_lse.double().cpu() - lse)[seen].abs().max()) < bound * float(lse[seen].abs().max())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_half_precision_is_rounded_where_it_is_asked_for_alone(backend, device):
    # float16: the interpreter cuts bfloat16 off where a GPU rounds.
    _, _, exact = _parts(torch.Generator().manual_seed(0))
    parts = [(out.half().to(device), lse.float().to(device)) for out, lse in exact]
    weights = torch.stack([lse.double() for _, lse in parts]).softmax(0).nan_to_num(0.0).transpose(2, 3)[..., None]
    wanted = (weights * torch.stack([out.double() for out, _ in parts])).sum(0)
    before = parts[1][0].clone(), parts[1][1].clone()
    between = merge_attention(parts[0][0].clone(), parts[0][1].clone(), *parts[1], backend=backend)
    assert between[0].dtype == torch.float32
    assert torch.equal(parts[1][0], before[0])
    assert torch.equal(parts[1][1], before[1])
    found, _ = merge_attention(*between, *parts[2], torch.float16, backend)
    assert found.dtype == torch.float16
    # Half a unit in the last place, and what the merges round in float32 of outputs of unit size.
    single = 16 * torch.finfo(torch.float32).eps * wanted.abs().max()
    assert bool(((found.double() - wanted).abs() <= torch.finfo(torch.float16).eps / 2 * wanted.abs() + single).all())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_shows_where_it_is_seen_and_nowhere_else(backend, device):
    out, lse = torch.zeros(1, 4, 1, 16, device=device), torch.zeros(1, 1, 4, device=device)
    part, part_lse = torch.zeros_like(out), torch.zeros_like(lse)
    part[0, 0], part_lse[0, 0, 0] = torch.nan, torch.nan
    part[0, 1], part_lse[0, 0, 1] = torch.nan, -torch.inf  # nobody sees that one
    out, lse = merge_attention(out, lse, part, part_lse, backend=backend)
    assert out[0, 0].isnan().all()
    assert lse[0, 0, 0].isnan()
    assert not out[0, 1:].isnan().any()
    assert not lse[0, 0, 1:].isnan().any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_parts_of_a_mask_are_its_blocks(backend, device):
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(1, 2, 5, 7, generator=generator) < 0.5
    partial = torch.rand(1, 2, 5, 7, generator=generator) < 0.5
    bit_rows = torch.where(partial & (torch.rand(1, 2, 5, 7, generator=generator) < 0.5), 1, -1)
    bits = torch.randint(-(2**31), 2**31 - 1, (2, 64, 1), dtype=torch.int32, generator=generator)
    mask = BlockMask.from_dense(keep, 64, 32, 300, 210, partial=partial, bit_rows=bit_rows, token_bits=bits)
    whole = mask.to_tokens()
    mask = mask.to(device)
    spans = [slice(0, 3), slice(3, 4), slice(4, 7)]
    for rows in (slice(0, 2), slice(2, 5)):
        parts = [part.to("cpu") for part in mask.parts(rows, spans, backend)]
        tokens = torch.cat([part.to_tokens() for part in parts], -1)
        assert torch.equal(tokens, whole[:, :, 64 * rows.start : 64 * rows.stop])
        for part, span in zip(parts, spans, strict=True):
            assert torch.equal(part.partial_to_dense(), mask.to("cpu").partial_to_dense()[:, :, rows, span])
            assert bool((part.kv_num_full <= part.kv_num_blocks).all())
