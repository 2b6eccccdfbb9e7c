"""The projection of the linear branch and its gradients, against float64 and against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from dit_accel.kernels.projection import project, sum_rows

ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def leaves(shape, dtype, device, features=48):
    torch.manual_seed(3)
    drawn = torch.randn(*shape, features), torch.randn(40, features), torch.randn(40)
    return [x.to(device, dtype).requires_grad_() for x in drawn]


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("shape", [(2, 700, 3), (1, 5, 3), (1, 1024, 2), (4096,)], ids=str)
def test_values_and_gradients(shape, dtype, device):
    x, weight, bias = leaves(shape, dtype, device)
    grad = torch.randn(*shape, 40).to(device, dtype)
    out = project(x, weight, bias)
    found = torch.autograd.grad(out, (x, weight, bias), grad)
    exact_in = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    exact_out = F.linear(*exact_in)
    exact = torch.autograd.grad(exact_out, exact_in, grad.double())
    usual_in = [t.detach().requires_grad_() for t in (x, weight, bias)]
    usual_out = F.linear(*usual_in)
    usual = torch.autograd.grad(usual_out, usual_in, grad)
    for name, got, want, torchs in zip(
        ("out", "x", "weight", "bias"), (out, *found), (exact_out, *exact), (usual_out, *usual), strict=True
    ):
        assert got.dtype == dtype
        assert got.shape == want.shape
        error, allowed = ((t.double() - want).abs().max() for t in (got, torchs))
        # As good as torch's own, but for the order of the sums: a rounding of the result.
        assert error <= allowed + 2 * ROUNDOFF[dtype] * want.abs().max(), name


@pytest.mark.parametrize("rows", [0, 1, 1023, 1024, 5000])
def test_sums_of_any_number_of_rows(rows, device):
    x = torch.randn(rows, 16, dtype=torch.float64, device=device)
    torch.testing.assert_close(sum_rows(x), x.sum(0))


def test_sums_of_half_precision_are_float32(device):
    # A thousand ones and more: in bfloat16 a sum would stop at 256.
    assert sum_rows(torch.ones(5000, 4, dtype=torch.bfloat16, device=device)).tolist() == [5000.0] * 4


def test_rows_that_do_not_lie_side_by_side(device):
    x, weight, bias = leaves((2, 700, 3), torch.float32, device)
    apart = x.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    grad = torch.randn(3, 700, 2, 40, device=device).transpose(0, 2)
    found = torch.autograd.grad(project(apart, weight, bias), (apart, weight, bias), grad)
    wanted = torch.autograd.grad(F.linear(x, weight, bias), (x, weight, bias), grad)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_only_the_gradients_that_are_asked_for(device):
    x, weight, bias = leaves((1, 50, 3), torch.float32, device)
    (only,) = torch.autograd.grad(project(x.detach(), weight.detach(), bias).sum(), bias)
    torch.testing.assert_close(only, torch.full_like(bias, 150.0))


def test_a_second_derivative_raises(device):
    x, weight, bias = leaves((1, 50, 3), torch.float32, device)
    (first,) = torch.autograd.grad(project(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_autocast_chooses_the_dtype(device):
    x, weight, bias = leaves((1, 50, 3), torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = project(x, weight, bias)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32
