"""Steps of the dense phase by the block-sparse kernel."""

import pytest
import torch

from dit_accel import engine as engines
from dit_accel import presets
from dit_accel.call import AttentionInputs
from dit_accel.dense_kernel import keeps_up_with_dense
from dit_accel.engine import Engine
from dit_accel.kernels.attention.variants import ON_HOPPER, kernel_of
from dit_accel.kernels.common.choice import Choice
from dit_accel.layout import StepContext, TokenLayout
from tests.calls import attend
from tests.stages.oracle import masked_attention

LAYOUT = TokenLayout((4, 8, 8), 0, 256)
RECIPE = presets.mass(density=0.3, dense_fraction=0.3, block=(32, 32)).with_fields({"schedule.own_dense": True})
FIRST = StepContext(index=0, num_steps=10)


def _tensors(queries=256, heads=4, kv_heads=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, queries, heads, 16), (1, 256, kv_heads, 16), (1, 256, kv_heads, 16))
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.fixture
def kept_up(monkeypatch):
    """As if there were a kernel that is as fast."""
    monkeypatch.setattr(engines, "keeps_up_with_dense", lambda choice: True)


def _first_step(inputs, layout=LAYOUT, recipe=RECIPE):
    """The output of the first step, and whether the model's own attention ran."""
    engine, ran = Engine(recipe, ["layer"], "reference", 0), []

    def own():
        ran.append(True)
        return inputs.v

    out = attend(engine, 0, inputs, layout, FIRST, own)
    assert dict(engine.records[0].dense_calls) == {"dense phase": 1}
    return out, bool(ran)


@pytest.mark.parametrize("case", ["plain", "masked", "grouped", "few queries"])
def test_the_kernel_attends_to_all(kept_up, case):
    layout, key_mask = LAYOUT, None
    q, k, v = _tensors(kv_heads=2 if case == "grouped" else 4, queries=64 if case == "few queries" else 256)
    if case == "masked":
        key_mask = torch.arange(256)[None] < 200
    if case == "few queries":
        layout = TokenLayout((4, 8, 8), 0, 256, queries=(64, 64))
    out, own = _first_step(AttentionInputs(q, k, v, key_mask), layout)
    assert not own
    k, v = (x.repeat_interleave(4 // x.shape[2], dim=2) for x in (k, v))
    shown = torch.ones(q.shape[1], 256, dtype=torch.bool) if key_mask is None else key_mask.expand(256, -1)
    expected = masked_attention(q, k, v, shown[None, None])
    assert out.shape == q.shape
    assert (out - expected).abs().max() <= 1e-12


def test_the_summary_does_not_call_it_a_search(kept_up):
    inputs = AttentionInputs(*_tensors())
    engine = Engine(RECIPE, ["layer"], "reference", 0)
    attend(engine, 0, inputs, LAYOUT, FIRST, lambda: inputs.v)
    assert engine.backends_used.to_dict() == {"dense_attention": {"reference": "asked for by name"}}


@pytest.mark.parametrize("keeps_up", [False, True])
@pytest.mark.parametrize("few", [False, True], ids=["grouped", "few queries"])
def test_an_observer_sees_a_dense_call_as_it_was_given(monkeypatch, few, keeps_up):
    monkeypatch.setattr(engines, "keeps_up_with_dense", lambda choice: keeps_up)
    layout = TokenLayout((4, 8, 8), 0, 256, queries=(64, 64)) if few else LAYOUT
    inputs = AttentionInputs(*_tensors(queries=64 if few else 256, kv_heads=4 if few else 2))
    engine, seen = Engine(RECIPE, ["layer"], "reference", 0), []
    engine.observer = seen.append
    attend(engine, 0, inputs, layout, FIRST, lambda: inputs.q)
    (call,) = seen
    assert call.q is inputs.q
    assert call.k is inputs.k
    assert call.v is inputs.v


def test_autocast_casts_the_call_and_nothing_within_the_kernel(kept_up):
    inputs = AttentionInputs(*_tensors(dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, own = _first_step(inputs)
    assert not own
    cast, _ = _first_step(AttentionInputs(*(x.bfloat16() for x in inputs[:3])))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, cast)


def test_what_it_cannot_do_is_the_models_own(kept_up):
    q, k, v = _tensors()
    inputs = AttentionInputs(q, k, v)
    assert _first_step(inputs, recipe=RECIPE.with_fields({"schedule.own_dense": False}))[1]
    q.requires_grad_()
    assert _first_step(AttentionInputs(q, k, v))[1], "gradients"
    assert _first_step(AttentionInputs(*_tensors()[:2], _tensors()[2][..., :8]))[1], "values of another head dim"
    pairs = torch.ones(1, 1, 256, 256, dtype=torch.bool).tril()
    engine = Engine(RECIPE, ["layer"], "reference", 0)
    called = []
    attend(engine, 0, AttentionInputs(*_tensors(), pairs), LAYOUT, FIRST, lambda: called.append(1) or inputs.v)
    assert called, "queries that see different keys"


def test_no_kernel_but_hoppers_is_taken_for_fast():
    fastest = Choice("triton", "the fastest that runs here")
    assert kernel_of(fastest, None).reason.endswith(ON_HOPPER)
    assert keeps_up_with_dense(kernel_of(fastest, None))
    assert not keeps_up_with_dense(kernel_of(fastest, "the GPU is no Hopper"))
    assert not keeps_up_with_dense(Choice("torch", "no GPU"))
    q, k, v = _tensors()
    assert _first_step(AttentionInputs(q, k, v))[1]


def test_its_mask_is_made_by_the_backend_that_was_named(kept_up, monkeypatch):
    engine, made_by = Engine(RECIPE, ["layer"], "reference", 0), []
    tables = engine.planner.tables
    full_mask = tables.full_mask

    def seen(call):
        made_by.append(call.backend("selection"))
        return full_mask(call)

    monkeypatch.setattr(tables, "full_mask", seen)
    hidden = torch.arange(256)[None] < 200
    attend(engine, 0, AttentionInputs(*_tensors(), hidden), LAYOUT, FIRST, lambda: pytest.fail("the model's own"))
    assert made_by == ["reference"]
