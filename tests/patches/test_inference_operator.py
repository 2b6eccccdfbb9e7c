"""Graphs without gradients hold an operator of fewer wrappers, which does the same."""

import traceback

import pytest
import torch

import dit_accel
from dit_accel.patches import inference_operator, operator
from tests.peaked import peaked
from tests.recipes import POOLED
from tests.tiny import TINY


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A compiler that runs graphs as they are, and keeps the names of the package's operators in them."""

    def __init__(self):
        self.operators = []

    def __call__(self, graph, _inputs):
        targets = (str(node.target) for node in graph.graph.nodes)
        self.operators += [target for target in targets if target.startswith("dit_accel.")]
        return graph


def forward(compiler):
    """Of a patched model, its blocks compiled."""
    model = peaked(TINY["wan"].build().transformer)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    inputs = {
        "hidden_states": torch.randn(1, 16, 3, 14, 12, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 16, 32, generator=generator),
    }
    with dit_accel.patch(model, POOLED, backend="torch") as handle:
        model.compile_repeated_blocks(fullgraph=True, backend=compiler)
        out = model(**inputs).sample
        assert handle.summary().sparse_calls > 0
    return out


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_graph_without_gradients_takes_the_short_operator_and_computes_the_same(mode):
    with_gradients, without = Graphs(), Graphs()
    expected = forward(with_gradients)
    torch._dynamo.reset()
    with mode():
        found = forward(without)
    assert set(with_gradients.operators) == {"dit_accel.attention.default"}
    assert set(without.operators) == {"dit_accel.attention_inference.default"}
    assert torch.equal(found, expected)


def test_compiled_code_without_gradients_serves_none_that_asks_for_them():
    seen = Graphs()
    model = peaked(TINY["wan"].build().transformer)
    with dit_accel.patch(model, POOLED, backend="torch"):
        model.compile_repeated_blocks(fullgraph=True, backend=seen)
        inputs = {
            "hidden_states": torch.randn(1, 16, 3, 14, 12),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": torch.randn(1, 16, 32),
        }
        with torch.no_grad():
            model(**inputs)
        model(**inputs).sample.square().mean().backward()
        weights = [p.grad for name, p in model.named_parameters() if ".attn1.to_q.weight" in name]
    assert set(seen.operators) == {"dit_accel.attention.default", "dit_accel.attention_inference.default"}
    assert weights
    assert all(weight is not None and weight.abs().sum() > 0 for weight in weights)


def frames_below(monkeypatch, call):
    """Files of torch on the stack between an operator's call and the function that it runs."""
    found = []

    def attend(q, *_rest):
        found.extend(frame.filename for frame in traceback.extract_stack())
        return q.clone()

    monkeypatch.setattr(operator, "attend", attend)
    monkeypatch.setattr(inference_operator, "attend", attend)
    call()
    return [name for name in found if "/torch/_library/" in name or "/torch/_dynamo/" in name]


def test_the_short_operator_runs_no_python_of_torch(monkeypatch):
    q = torch.randn(1, 4, 1, 8)
    rest = ([], 0, None, [], None, False, None, True, False)
    layer = torch.tensor([1 << 40, 0])
    with torch.no_grad():
        short = lambda: inference_operator.inference_attention_op(q, q, q, None, layer, *rest)  # noqa: E731
        assert frames_below(monkeypatch, short) == []
        # What it spares, by which the look at the stack is known to see it.
        long = lambda: operator.attention_op(q, q, q, None, layer, None, *rest)  # noqa: E731
        assert len(frames_below(monkeypatch, long)) > 4


def test_the_short_operators_fake_has_shape_and_strides_of_the_real():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(2, 3, 8, 4).transpose(1, 2)
        v = torch.empty(2, 8, 3, 6)
        layer = torch.empty(2, dtype=torch.int64)
        rest = ([], 0, None, [], None, False, None, True, False)
        out = inference_operator.inference_attention_op(q, q, v, None, layer, *rest)
    assert (out.shape, out.is_contiguous()) == ((2, 8, 3, 6), True)


def test_no_compiled_graph_is_captured_with_it():
    assert set(operator.TAGS) <= set(inference_operator.inference_attention_op.tags)
    assert set(operator.TAGS) == {tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None}
