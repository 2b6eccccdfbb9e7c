"""The linear branch projected and added, with every gradient: against float64, and against its parts composed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dit_accel.kernels.linear.api import linear_branch, marginal_map, plus_linear_branch

from .test_linear_branch import draw, hide_keys, oracle, rounding
from .test_selection import NAMED, permutations

NAMES = ("out", "q", "k", "v", "weight", "bias")


def leaves(q, k, v, bias, per_head=False, seed=7):
    """The sparse output, not contiguous, q, k, v and float32 parameters that half precision holds exactly."""
    gen = torch.Generator().manual_seed(seed)
    batch, seq, heads, dim = q.shape
    out = torch.randn(batch, heads, seq, 2 * dim, generator=gen).to(q)[..., ::2].transpose(1, 2)
    lead = (heads,) if per_head else ()
    weight = (torch.randn(*lead, dim, dim, generator=gen) / dim**0.5).half().float().to(q.device)
    shift = torch.randn(*lead, dim, generator=gen).half().float().to(q.device) if bias else None
    return [None if x is None else x.detach().requires_grad_() for x in (out, q, k, v, weight, shift)]


def exact(tensors, grad, marginal, blocks, rows=None, key_mask=None, kind="softmax", eps=0.0):
    """Output and gradients in float64, every token against every token."""
    twins = [None if x is None else x.detach().double() for x in tensors]
    if key_mask is not None:
        twins[2:4] = (x.masked_fill(~key_mask[..., None, None], 0) for x in twins[2:4])
    twins = [None if x is None else x.requires_grad_() for x in twins]
    out, q, k, v, weight, bias = twins
    branch = oracle(q, k, v, kind, marginal, blocks, rows, key_mask, eps)
    result = out + torch.einsum("bshd,hed->bshe", branch, weight.expand(q.shape[2], -1, -1))
    result = result if bias is None else result + bias
    given = [x for x in twins if x is not None]
    return result.detach(), torch.autograd.grad(result, given, grad.double())


CASES = [
    # batch, seq, heads, dim, bq, bk, map, negligible, permuted, masked, bias, per head, dtype
    (1, 128, 1, 64, 64, 32, "softmax", False, False, False, True, False, torch.float32),
    (2, 150, 2, 64, 32, 16, "softmax", True, False, False, False, False, torch.float32),
    (1, 150, 2, 96, 64, 64, "elu", True, True, False, True, False, torch.float16),
    (1, 140, 2, 128, 128, 64, "softmax", False, True, True, True, True, torch.float16),
    (2, 77, 2, 40, 32, 32, "relu", True, True, True, True, True, torch.float32),
    (1, 200, 1, 64, 64, 32, "softmax", True, False, False, True, False, torch.float16),
]


@pytest.mark.parametrize("backend", NAMED)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"S{c[1]}-D{c[3]}-{c[6]}-{str(c[-1])[6:]}")
@pytest.mark.parametrize("everything", [False, True], ids=["marginal", "all-tokens"])
def test_values_and_gradients(backend, case, everything, device):
    batch, seq, heads, dim, block_q, block_k, kind, low, permuted, masked, bias, per_head, dtype = case
    q, k, v, grad, critical, negligible = draw(
        batch, seq, heads, dim, block_q, block_k, dtype, device, low and not everything
    )
    rows = permutations(1, heads, seq).to(device) if permuted else None
    key_mask = hide_keys(k, v) if masked else None
    marginal = None if everything else marginal_map(critical, negligible)
    tensors = leaves(q, k, v, bias, per_head)
    before = tensors[0].detach().clone()
    eps = 1e-5 if everything else 0.0
    result = plus_linear_branch(
        *tensors[:4], None if everything else critical, *tensors[4:], negligible=negligible, feature_map=kind,
        rows=rows, key_mask=key_mask, eps=eps, backend=backend,
    )  # fmt: skip
    given = [x for x in tensors if x is not None]
    found = torch.autograd.grad(result, given, grad)
    wanted, gradients = exact(tensors, grad, marginal, (block_q, block_k), rows, key_mask, kind, eps)
    assert torch.equal(tensors[0], before)
    assert torch.equal(found[0], grad)
    # As for the branch alone: each of phi, projected state, sum and output is rounded once, the gradients twice as
    # often; a gradient of the weight goes through those of values or states.
    unit = rounding(dtype)
    assert result.dtype == dtype
    assert (result - wanted).abs().max() <= 8 * unit * wanted.abs().max()
    for name, leaf, got, want in zip(NAMES, given, found, gradients):
        assert got.dtype == leaf.dtype
        assert got.shape == leaf.shape
        assert (got - want).abs().max() <= 16 * unit * want.abs().max(), name
    if bias and backend == "triton":
        # A sum of given numbers in float32, whatever their own dtype: as many roundings as terms, at most.
        total = grad.double().abs().sum((0, 1)).sum(0).max()
        assert (found[-1] - gradients[-1]).abs().max() <= batch * seq * 2.0**-24 * total


@pytest.mark.parametrize("everything", [False, True], ids=["marginal", "all-tokens"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str
)
def test_no_worse_than_its_parts(everything, dtype, device):
    """Branch, linear layer and sum apart, as autograd strings them together."""
    q, k, v, grad, critical, negligible = draw(2, 190, 3, 64, 64, 32, dtype, device, not everything)
    mask, eps = (None, 1e-5) if everything else (critical, 0.0)
    marginal = None if everything else marginal_map(critical, negligible)
    tensors = leaves(q, k, v, True)
    whole = plus_linear_branch(
        *tensors[:4], mask, *tensors[4:], negligible=negligible, eps=eps, backend="triton",
    )  # fmt: skip
    apart = linear_branch(*tensors[1:4], mask, negligible=negligible, eps=eps, backend="triton")
    apart = tensors[0] + F.linear(apart, *(x.to(dtype) for x in tensors[4:]))
    wanted, gradients = exact(tensors, grad, marginal, (64, 32), eps=eps)
    ours, theirs = (torch.autograd.grad(x, tensors, grad) for x in (whole, apart))
    for name, got, parts, want in zip(
        ("result", *NAMES), (whole, *ours), (apart, *theirs), (wanted, *gradients), strict=True
    ):
        error, allowed = ((x.double() - want).abs().max() for x in (got, parts))
        # As many roundings or fewer; which way each goes is chance, so a rounding of the result on top.
        assert error <= allowed + rounding(dtype) * want.abs().max(), name


def test_only_the_gradients_that_are_asked_for(device, monkeypatch):
    from dit_accel.kernels.linear.triton import backward as linear_backward

    q, k, v, grad, critical, _ = draw(1, 60, 2, 32, 32, 32, torch.float32, device, False)
    launched = []
    for name in ("launch_dq", "launch_dkv"):
        launch = getattr(linear_backward, name)
        monkeypatch.setattr(
            linear_backward, name, lambda *a, _n=name, _f=launch, **o: (launched.append(_n), _f(*a, **o))[1]
        )
    kernels = {
        # (wanted, all tokens): a weight's gradient is one of values, or of the state alone.
        ("out", True): [],
        ("bias", True): [],
        ("weight", True): ["launch_dq"],
        ("weight", False): ["launch_dq", "launch_dkv"],
        ("q", True): ["launch_dq"],
        ("q", False): ["launch_dq"],
        ("v", True): ["launch_dq", "launch_dkv"],
    }
    for (name, everything), expected in kernels.items():
        mask = None if everything else critical
        tensors = leaves(q, k, v, True)
        every = torch.autograd.grad(
            plus_linear_branch(*tensors[:4], mask, *tensors[4:], backend="triton"), tensors, grad
        )
        chosen = [x.detach().requires_grad_(label == name) for label, x in zip(NAMES, tensors)]
        result = plus_linear_branch(*chosen[:4], mask, *chosen[4:], backend="triton")
        launched.clear()
        (only,) = torch.autograd.grad(result, chosen[NAMES.index(name)], grad)
        # The same sums of up to 64 products, whose order a processor's matrix product chooses by their layout.
        expected_gradient = every[NAMES.index(name)]
        rounding = 64 * torch.finfo(torch.float32).eps * expected_gradient.abs().max().item()
        torch.testing.assert_close(only, expected_gradient, rtol=0.0, atol=rounding)
        assert launched == expected, name


@pytest.mark.parametrize("everything", [False, True], ids=["marginal", "all-tokens"])
def test_keeps_its_inputs_and_one_state(everything, device):
    q, k, v, grad, critical, _ = draw(2, 300, 3, 32, 32, 32, torch.float16, device, False)
    mask = None if everything else critical
    tensors, kept = leaves(q, k, v, True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = plus_linear_branch(*tensors[:4], mask, *tensors[4:], backend="triton")
    known = {t.untyped_storage().data_ptr() for t in tensors[1:]}
    new = [tuple(t.shape) for t in kept if t.untyped_storage().data_ptr() not in known]
    assert new == ([(6, 1, 32 * 32 + 32)] if everything else [])
    # The sparse output takes the incoming gradient itself.
    (same,) = torch.autograd.grad(result, tensors[:1], grad)
    assert same.data_ptr() == grad.data_ptr()


def test_under_checkpointing_and_autocast(device):
    """A caller's checkpoint repeats the forward; autocast reaches neither it nor the backward."""
    q, k, v, grad, critical, _ = draw(1, 90, 2, 32, 32, 32, torch.float32, device, False)
    for mask in (critical, None):
        tensors = leaves(q, k, v, True)

        def call(*x, mask=mask):
            return plus_linear_branch(*x[:4], mask, *x[4:], backend="triton")

        wanted = torch.autograd.grad(call(*tensors), tensors, grad)
        again = torch.autograd.grad(checkpoint(call, *tensors, use_reentrant=False), tensors, grad)
        with torch.autocast(device.type, torch.bfloat16):
            mixed = torch.autograd.grad(call(*tensors), tensors, grad)
        for want, *others in zip(wanted, again, mixed, strict=True):
            assert all(torch.equal(want, other) for other in others)


def test_a_second_derivative_raises(device):
    q, k, v, _, critical, _ = draw(1, 60, 1, 32, 32, 32, torch.float32, device, False)
    tensors = leaves(q, k, v, True)
    result = plus_linear_branch(*tensors[:4], critical, *tensors[4:], backend="triton")
    (first,) = torch.autograd.grad(result.square().sum(), tensors[1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("backend", NAMED)
def test_errors(backend, device):
    q, k, v, _, critical, _ = draw(1, 60, 2, 32, 32, 32, torch.float32, device, False)
    out, *_, weight, bias = leaves(q, k, v, True)
    with pytest.raises(ValueError, match="out must have q's shape"):
        plus_linear_branch(out[:, :-1], q, k, v, critical, weight, bias, backend=backend)
    with pytest.raises(ValueError, match="weight must be"):
        plus_linear_branch(out, q, k, v, critical, weight[:-1], bias, backend=backend)
    with pytest.raises(ValueError, match="bias must be"):
        plus_linear_branch(out, q, k, v, critical, weight, bias[:-1], backend=backend)
