"""Which calls of the Triton backend skip its operator: those that nobody looks at."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dit_accel.kernels import BlockMask
from dit_accel.kernels.attention import op


def tensors():
    return [torch.zeros(1, 16, 1, 16) for _ in range(3)]


def test_tensors_without_gradients_are_plain():
    assert op._is_plain(*tensors())
    assert op._is_plain(*(torch.nn.Parameter(x, requires_grad=False) for x in tensors()))


@pytest.mark.parametrize("which", range(3))
def test_a_gradient_that_is_asked_for_needs_the_operator(which):
    q = tensors()
    q[which].requires_grad_()
    assert not op._is_plain(*q)
    with torch.no_grad():
        assert op._is_plain(*q)
    with torch.inference_mode():
        assert op._is_plain(*q)


def test_modes_and_stand_ins_need_the_operator():
    with FlopCounterMode(display=False):
        assert not op._is_plain(*tensors())
    with FakeTensorMode():
        fake = tensors()
    assert not op._is_plain(*fake)


def test_transforms_of_functions_need_the_operator():
    seen = []

    def square(x):
        seen.append(op._is_plain(x, x, x))
        return (x * x).sum()

    torch.func.grad(square)(torch.ones(2))
    torch.func.vmap(square)(torch.ones(2, 2))
    assert seen == [False, False]


def test_a_graph_needs_the_operator():
    seen = []

    def traced(x):
        seen.append(op._is_plain(x, x, x))
        return x + 1

    torch.compile(traced, backend="eager", fullgraph=False)(torch.ones(2))
    assert seen[-1] is False


def test_only_plain_calls_count_in_zeros_that_outlive_them(monkeypatch):
    """An operator may run in memory of a compiled graph, where what stays would be overwritten."""
    seen = []
    monkeypatch.setattr(op, "why_not_hopper_half", lambda *_args: None)
    hopper = pytest.importorskip("dit_accel.kernels.attention.hopper.forward")

    def counted(q, _k, _v, _mask, _rows, _key_mask, _scale, pieces=None, means=None):
        assert means is None
        seen.append(pieces)
        return q.clone(), q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)

    monkeypatch.setattr(hopper, "hopper_forward", counted)
    q = torch.randn(1, 16, 1, 16)
    mask = BlockMask.from_dense(torch.ones(1, 1, 1, 1, dtype=torch.bool), 16, 16, 16, 16)
    op.triton_attention(q, q, q, mask, scale=0.25)
    op.triton_attention(q.clone().requires_grad_(), q, q, mask, scale=0.25)
    assert [pieces is None for pieces in seen] == [False, True]
