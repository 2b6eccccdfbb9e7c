"""The projections of the linear branch, and the sum that a bias's gradient is, against float64."""

import pytest
import torch

from dit_accel.kernels.linear.projection import project_heads, sum_rows

ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("bias", [None, "shared", "per head"])
@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per-head"])
def test_projected_heads(per_head, bias, dtype, device):
    torch.manual_seed(3)
    heads, dim = 3, 48
    x = torch.randn(2, 70, heads, dim).to(device, dtype)
    # Parameters stay float32 in training; what they are rounded to is not the question here.
    weight = torch.randn(*([heads] if per_head else []), dim, dim).to(device, dtype).float()
    shift = None
    if bias is not None:
        shift = torch.randn(*([heads] if bias == "per head" else []), dim).to(device, dtype).float()
    out = project_heads(x, weight, shift)
    assert out.dtype == dtype

    def exact(x, weight, shift):
        result = torch.einsum("bshd,hed->bshe", x, weight.expand(heads, dim, dim))
        return result if shift is None else result + shift

    wide = [None if t is None else t.double() for t in (x, weight, shift)]
    size = exact(*(None if t is None else t.abs() for t in wide))
    # A product and a sum, each rounded once; sums of dim terms in float32.
    assert torch.all((out - exact(*wide)).abs() <= (2 * ROUNDOFF[dtype] + dim * 2.0**-24) * size)


@pytest.mark.parametrize("rows", [0, 1, 1023, 1024, 5000])
def test_sums_of_any_number_of_rows(rows, device):
    x = torch.randn(rows, 16, dtype=torch.float64, device=device)
    torch.testing.assert_close(sum_rows(x), x.sum(0))


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
def test_sums_of_rows_that_do_not_lie_side_by_side(dtype, device):
    x = torch.randn(16, 2 * 5000, device=device).to(dtype).T[::2]
    exact = x.double().sum(0)
    # As many roundings as terms, at most, in float32.
    assert torch.all((sum_rows(x) - exact).abs() <= 5000 * 2.0**-24 * x.double().abs().sum(0))


def test_sums_of_half_precision_are_float32(device):
    # A thousand ones and more: in bfloat16 a sum would stop at 256.
    assert sum_rows(torch.ones(5000, 4, dtype=torch.bfloat16, device=device)).tolist() == [5000.0] * 4
