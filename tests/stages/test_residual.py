"""Blocks left out as single keys, against the equation, query by query in float64."""

import itertools
import math

import pytest
import torch

from dit_accel import Recipe, kept_attention
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.kernels.pyramid import means
from dit_accel.layout import StepContext
from dit_accel.stages.compensate.residual import PooledResidual
from dit_accel.stages.order.axes import AxisOrder
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.precision import Int8, ModelDtype
from dit_accel.stages.select.pooled import Pooled
from dit_accel.stages.select.static import FullSelect, Window
from tests.calls import attend
from tests.stages.block_oracle import LAYOUTS, half_hidden, inputs
from tests.stages.oracle import masked_attention

BLOCK = (64, 32)
ORDERS = [Raster(), Tiles((2, 4, 4)), AxisOrder((("fhw", "whf", "hfw"),))]


def _run(recipe, layout, q, k, v, key_mask=None):
    engine = Engine(recipe, ["layer"], "auto", 0)
    calls = []
    engine.observer = calls.append
    out = attend(engine, 0, AttentionInputs(q, k, v, key_mask), layout, StepContext(), lambda: pytest.fail("ran dense"))
    return out, calls[0].plan, engine


def _rows(plan, layout):
    """int64 ``[2, 3, S]``: the token of each slot."""
    rows = torch.arange(layout.seq_len).expand(1, 1, -1) if plan.rows is None else plan.rows.long()
    return rows.expand(2, 3, -1)


def _expected(plan, layout, q, k, v, key_mask=None, size=0):
    """The output in float64, ``[2, S, 3, D]``, and how many means it has; differentiable."""
    kept, slots, left_out = plan.mask.to_dense().expand(2, 3, -1, -1), _rows(plan, layout), 0
    result = torch.zeros(q.shape, dtype=torch.float64)
    for b, h in itertools.product(range(2), range(3)):
        order_of, queries, keys, values = (slots[b, h], *(x[b, :, h].double() for x in (q, k, v)))
        visible = torch.ones(layout.seq_len, dtype=torch.bool) if key_mask is None else key_mask[b]
        for i, tokens in enumerate(order_of.split(BLOCK[0])):
            logits, told = [], []
            for j, block in enumerate(order_of.split(BLOCK[1])):
                runs = [block] if kept[b, h, i, j] else block.split(size or BLOCK[1])
                for members in (run[visible[run]] for run in runs):
                    if not len(members):
                        continue
                    if kept[b, h, i, j]:
                        logits.append(queries[tokens] @ keys[members].T / 4)
                        told.append(values[members])
                    else:
                        left_out += 1
                        mean = keys[members].mean(0)
                        logits.append((queries[tokens] @ mean / 4 + math.log(len(members)))[:, None])
                        told.append(values[members].mean(0, keepdim=True))
            result[b, tokens, h] = torch.cat(logits, 1).softmax(-1) @ torch.cat(told)
    return result, left_out


@pytest.mark.parametrize("select", [Pooled(density=0.3, block=BLOCK), "window"], ids=["pooled", "window"])
@pytest.mark.parametrize("size", [0, 8], ids=["block means", "means of 8"])
@pytest.mark.parametrize("order", ORDERS, ids=["raster", "tiles", "axes"])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_residual(name, hidden, order, size, select, monkeypatch):
    monkeypatch.setattr(means, "LOGITS_AT_ONCE", 4000)  # several pieces
    layout = LAYOUTS[name]
    q, k = inputs(layout)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(5))
    key_mask = half_hidden(layout) if hidden else None
    if select == "window":
        select = Window(window=(1, 2, 2), block=BLOCK, whole=True)
    recipe = Recipe(order=order, select=select, compensate=PooledResidual(size))
    out, plan, engine = _run(recipe, layout, q, k, v, key_mask)
    assert plan.mask.token_bits is None or not (plan.mask.kv_bits >= 0).any()
    expected, left_out = _expected(plan, layout, q, k, v, key_mask, size)
    for b, h in itertools.product(range(2), range(3)):
        for tokens in _rows(plan, layout)[b, h].split(BLOCK[0]):
            rows = expected[b, tokens, h]
            assert (out[b, tokens, h].double() - rows).abs().max() <= 4e-6 * rows.abs().max()
    assert left_out > 5
    density = float(plan.mask.density())
    assert float(engine.records[0].density_sum) == pytest.approx(density + (1 - density) / (size or 32))


def test_means_must_fit_a_block():
    with pytest.raises(ValueError, match=r"compensate\.tokens must divide a key block of 32 tokens, got 24"):
        Recipe(select=Pooled(block=BLOCK), compensate=PooledResidual(24))
    with pytest.raises(ValueError, match="at least 0 tokens, got -1"):
        PooledResidual(-1)


def test_nothing_left_out_changes_nothing():
    layout = LAYOUTS["text last"]
    q, k = inputs(layout)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(5))
    out, _, _ = _run(Recipe(select=FullSelect(BLOCK), compensate=PooledResidual()), layout, q, k, v)
    exact = masked_attention(q, k, v, torch.ones(layout.seq_len, layout.seq_len, dtype=torch.bool))
    assert (out.double() - exact).abs().max() <= 4e-6 * exact.abs().max()


def test_constant_keys_make_it_exact():
    """Where all keys of a block are one key, their mean with its count is all of them."""
    layout = LAYOUTS["even"]
    q, k = inputs(layout)
    k = k.view(2, 4, 32, 3, 16)[:, :, :1].expand(2, 4, 32, 3, 16).reshape(k.shape)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(5))
    recipe = Recipe(select=Pooled(density=0.1, block=BLOCK), compensate=PooledResidual())
    out, plan, _ = _run(recipe, layout, q, k, v)
    assert float(plan.mask.density()) < 0.8
    exact = masked_attention(q, k, v, torch.ones(128, 128, dtype=torch.bool))
    assert (out.double() - exact).abs().max() <= 4e-6 * exact.abs().max()


def test_nan_is_passed_on():
    layout = LAYOUTS["even"]
    q, k = inputs(layout)
    q[0, 5, 1, 3] = float("nan")
    recipe = Recipe(select=Pooled(density=0.3, block=BLOCK), compensate=PooledResidual())
    out, _, engine = _run(recipe, layout, q, k, k)
    assert out[0, 5, 1].isnan().all()
    assert out[1].isfinite().all()
    assert int(engine.records[0].nan_calls) == 1


@pytest.mark.parametrize("precision", [ModelDtype(), Int8()], ids=["model", "int8"])
def test_means_go_with_the_launch_that_takes_them(precision, monkeypatch):
    """Where a kernel takes them, nothing goes on over them; where none does, the output is the same."""
    layout = LAYOUTS["text last"]
    q, k = inputs(layout)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(5))
    recipe = Recipe(Tiles((2, 4, 4)), Pooled(density=0.3, block=BLOCK), PooledResidual(), precision)
    wanted = _run(recipe, layout, q, k, v)[0]
    kind, taken = type(precision), []
    attend_alone = kind.attend

    def attend_both(self, call, plan, backend, with_lse=False, given=None):
        out, lse = attend_alone(self, call, plan, backend, with_lse)
        taken.append(given)
        return means.add_left_out_means(
            out, lse, call.q, given.means, given.kept, block_q=BLOCK[0], rows=plan.rows, scale=call.scale
        )

    monkeypatch.setattr(kind, "why_not_means", lambda *_: None)
    monkeypatch.setattr(kind, "attend", attend_both)
    monkeypatch.setattr(kept_attention, "add_left_out_means", lambda *_, **__: pytest.fail("goes on over means"))
    assert torch.equal(_run(recipe, layout, q, k, v)[0], wanted)
    assert [given.means.tokens for given in taken] == [BLOCK[1]]


@pytest.mark.parametrize("learns", ["qkv", "q", "v"])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("order", ORDERS[:2], ids=["raster", "tiles"])
@pytest.mark.parametrize("name", ["even", "text last"])
def test_gradients(name, order, hidden, learns, monkeypatch):
    """Against those of the equation in float64, with blocks chosen alike."""
    monkeypatch.setattr(means, "LOGITS_AT_ONCE", 4000)  # several pieces
    layout, size = LAYOUTS[name], 8
    q, k = inputs(layout)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(5))
    given = dict(zip("qkv", (q, k, v), strict=True))
    of = [given[name].requires_grad_() for name in learns]
    key_mask = half_hidden(layout) if hidden else None
    recipe = Recipe(order=order, select=Pooled(density=0.3, block=BLOCK), compensate=PooledResidual(size))
    out, plan, _ = _run(recipe, layout, q, k, v, key_mask)
    expected, left_out = _expected(plan, layout, q, k, v, key_mask, size)
    assert left_out > 5
    toward = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
    found = torch.autograd.grad(out, of, toward)
    exact = torch.autograd.grad(expected, of, toward.double())
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        # A gradient sums over tokens what each errs by.
        assert float((one - other).abs().max()) <= 2e-5 * float(other.abs().max())
    with torch.no_grad():
        without, _, _ = _run(recipe, layout, *(x.detach() for x in (q, k, v)), key_mask)
    assert float((out - without).abs().max()) <= 4e-6 * float(out.abs().max())


def test_token_masks_are_refused():
    """A pair that a window hides in part is kept, and its hidden keys are in no mean."""
    with pytest.raises(ValueError, match=r"PooledResidual.*select\.whole=True"):
        Recipe(select=Window(), compensate=PooledResidual())
