"""Rotary embedding of queries and keys: against complex numbers in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dit_accel.kernels.rotary.api import rotate_pairs
from dit_accel.kernels.rotary.triton import TILE, rotate_pairs_triton

BATCH = 2


def drawn(length: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``[B, S, H, D]`` whose values next to it are NaN: what lies beside a head must not be read."""
    wide = torch.full((BATCH, length, heads, dim + 2), torch.nan, device=device, dtype=dtype)
    wide[..., :dim] = torch.randn(BATCH, length, heads, dim, device=device).to(dtype)
    return wide[..., :dim]


def angles(length: int, dim: int, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each NaN where only the other is to be read."""
    phases = 6.0 * torch.rand(batch, length, 1, dim // 2, device=device, dtype=torch.float64)
    nothing = torch.full_like(phases, torch.nan)
    cos = torch.stack((phases.cos(), nothing), -1).flatten(-2).float()
    sin = torch.stack((nothing, phases.sin()), -1).flatten(-2).float()
    return cos, F.pad(sin, (0, 2), value=torch.nan)[..., :dim]  # their strides differ


def expected(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turn = torch.complex(cos[..., 0::2].double(), sin[..., 1::2].double())
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Of two products and a sum in float32, or in float64, rounded once."""
    precision = torch.finfo(found.dtype).eps
    computed = min(precision, torch.finfo(torch.float32).eps)
    norms = wanted.unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, -1)  # of the pair, which cancels in a sum
    bound = precision / 2 * wanted.abs() + 4 * computed * norms + torch.finfo(found.dtype).tiny
    assert found.is_contiguous()
    assert bool(((found.double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "dim"),
    [(TILE, 2, 2, 16), (2 * TILE + 5, 3, 1, 64), (3, 1, 2, 24), (1, 2, 2, 128)],
)
@pytest.mark.parametrize("shared", [True, False])
def test_the_kernel_turns_every_head_by_its_tokens_angles(device, dtype, length, heads, kv_heads, dim, shared):
    torch.manual_seed(length)
    q, k = (drawn(length, number, dim, dtype, device) for number in (heads, kv_heads))
    cos, sin = angles(length, dim, 1 if shared else BATCH, device)
    for found, x in zip(rotate_pairs_triton(q, k, cos, sin), (q, k), strict=True):
        assert found.dtype == dtype
        assert_near(found, expected(x, cos, sin))


def test_the_kernel_takes_any_strides(device):
    q = torch.randn(BATCH, 3, TILE + 1, 16, device=device).transpose(1, 2)  # heads behind one another
    k = torch.randn(BATCH, TILE + 1, 2, 32, device=device)[..., ::2]  # columns apart
    cos, sin = angles(TILE + 1, 16, 1, device)
    for found, x in zip(rotate_pairs_triton(q, k, cos, sin), (q, k), strict=True):
        assert_near(found, expected(x, cos, sin))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [64, 72, 128])
def test_a_gpu_turns_them_too(dtype, dim):
    device = torch.device("cuda")
    q, k = (drawn(1234, number, dim, dtype, device) for number in (5, 2))
    cos, sin = angles(1234, dim, 1, device)
    for found, x in zip(rotate_pairs(q, k, cos, sin), (q, k), strict=True):
        assert_near(found, expected(x, cos, sin))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_torch_turns_them_where_no_kernel_runs(dtype):
    cpu = torch.device("cpu")
    q, k = (drawn(21, number, 16, dtype, cpu) for number in (3, 1))
    cos, sin = angles(21, 16, 1, cpu)
    for found, x in zip(rotate_pairs(q, k, cos, sin), (q, k), strict=True):
        assert found.dtype == dtype
        assert_near(found, expected(x, cos, sin))
