"""Compensated calls of the engine against the papers' equations, token by token in float64."""

import math

import numpy as np
import pytest
import torch

from dit_accel import Recipe
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.layout import StepContext
from dit_accel.stages.compensate.pooled_mass import PooledMass
from dit_accel.stages.compensate.pyramid import KeyPyramid
from dit_accel.stages.order.curve import Curve
from dit_accel.stages.order.simple import Raster
from dit_accel.stages.select.rectified import Reallocated
from dit_accel.stages.select.sampled import Sampled, sampled_importance
from dit_accel.stages.select.static import Window
from tests.calls import attend
from tests.stages.block_oracle import CPU, LAYOUTS, half_hidden, inputs, selected, views


def _run(recipe, layout, q, k, v, key_mask=None):
    engine = Engine(recipe, ["layer"], "auto", 0)

    def dense():
        raise AssertionError("fell back to dense attention")

    out = attend(engine, 0, AttentionInputs(q, k, v, key_mask), layout, StepContext(), dense)
    return out, float(engine.records[0].density_sum)


def _values(q):
    return torch.randn(q.shape, generator=torch.Generator().manual_seed(11))


@pytest.mark.parametrize("gain_aware", [True, False])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("order", [Raster(), Curve()], ids=["raster", "curve"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_rectified(name, order, hidden, gain_aware):
    layout, block = LAYOUTS[name], (64, 32)
    q, k = inputs(layout)
    # A shared direction, so that some gains exceed their errors.
    q, k = q + 1.0, 0.3 * k + 0.8
    v = _values(q)
    key_mask = half_hidden(layout) if hidden else None
    rows = order.rows(layout, CPU)
    select = Reallocated(density=0.2, top_p=0.2, neighbours=0, sink_first_frame=False, block=block)
    recipe = Recipe(order=order, select=select, compensate=PooledMass(gain_aware=gain_aware))
    out, _ = _run(recipe, layout, q, k, v, key_mask)
    keep = selected(select, layout, rows, q, k, key_mask)
    compensated = 0
    for heads in views(layout, rows, q, k, block, key_mask):
        for view in heads:
            values = v[view.b, :, view.h].double().numpy()
            for i, tokens in enumerate(view.q_blocks):
                mean = view.q[tokens].mean(0)
                spread = np.abs(view.q[tokens] - mean).mean(0)
                weights, extra = {}, np.zeros(16)
                for j, alive in enumerate(view.alive):
                    if view.text_k[j]:
                        weights[j] = sum(math.exp(view.scale * (mean @ view.k[token])) for token in alive)
                    elif alive:
                        weights[j] = len(alive) * math.exp(view.scale * (mean @ view.k[alive].mean(0)))
                total, rest = sum(weights.values()), 1.0
                for j, weight in weights.items():
                    if keep[view.b, view.h, i, j]:
                        continue
                    center = view.k[view.alive[j]].mean(0)
                    around = np.abs(view.k[view.alive[j]] - center).mean(0)
                    error = abs(spread @ center) + abs(mean @ around)
                    if not gain_aware or abs(mean @ center) > error:
                        compensated += 1
                        rest -= weight / total
                        extra += weight / total * values[view.alive[j]].mean(0)
                shown = [token for j, alive in enumerate(view.alive) if keep[view.b, view.h, i, j] for token in alive]
                logits = view.scale * view.q[tokens] @ view.k[shown].T
                prob = np.exp(logits - logits.max(1, keepdims=True))
                expected = rest * (prob / prob.sum(1, keepdims=True)) @ values[shown] + extra
                found = out[view.b, tokens, view.h].double().numpy()
                np.testing.assert_allclose(found, expected, atol=2e-5)
    assert compensated, "no block was compensated, the case shows nothing"


@pytest.mark.parametrize("similarity", [(), (0.57, 0.55, 0.53)], ids=["no gate", "gate"])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("order", [Raster(), Curve()], ids=["raster", "curve"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_psa(name, order, hidden, similarity):
    layout, block = LAYOUTS[name], (64, 32)
    bounds = (0.3, 0.5, 0.7, 0.9)
    q, k = inputs(layout)
    k = 0.5 * k + 0.6  # alike enough for some gates
    v = _values(q)
    key_mask = half_hidden(layout) if hidden else None
    rows = order.rows(layout, CPU)
    select = Sampled(density=0.06, top_p=bounds[0], block=block)
    recipe = Recipe(order=order, select=select, compensate=KeyPyramid(cumulative=bounds, similarity=similarity))
    out, density = _run(recipe, layout, q, k, v, key_mask)
    keep = selected(select, layout, rows, q, k, key_mask)
    kernel_rows = None if rows is None else rows[None, None]
    importance = sampled_importance(q, k, *block, rows=kernel_rows, key_mask=key_mask).double()
    read, met, refined = [], set(), 0
    for heads in views(layout, rows, q, k, block, key_mask):
        for view in heads:
            values = v[view.b, :, view.h].double().numpy()
            allowed = []
            for tokens in view.k_blocks:
                level = 1
                for step, bound in zip((2, 4, 8), similarity):
                    pairs = [
                        (view.k[tokens[n]], view.k[tokens[n + step - 1]])
                        for n in range(0, len(tokens) - step + 1, step)
                    ]
                    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
                    if not cosines or np.mean(cosines) <= bound:
                        break
                    level = step
                allowed.append(level if similarity else 8)
            for i, tokens in enumerate(view.q_blocks):
                row = importance[view.b, view.h, i].tolist()
                ranked = sorted(view.candidates, key=lambda j: -row[j])
                total, before = sum(row[j] for j in ranked), 0.0
                levels = [0] * len(view.k_blocks)
                for j in ranked:
                    level = next((L for L, bound in zip((1, 2, 4, 8), bounds) if before / total < bound), 0)
                    levels[j] = min(level, allowed[j])
                    refined += levels[j] < level
                    before += row[j]
                keys, vals, bias = [], [], []
                for j, block_tokens in enumerate(view.k_blocks):
                    level = 1 if keep[view.b, view.h, i, j] else levels[j]
                    met.add(level)
                    read.append(1 / level if level else 0.0)
                    if not level:
                        continue
                    for n in range(0, len(block_tokens), level):
                        run = [token for token in block_tokens[n : n + level] if view.visible[token]]
                        if run:
                            keys.append(view.k[run].mean(0))
                            vals.append(values[run].mean(0))
                            bias.append(math.log(len(run)))
                logits = view.scale * view.q[tokens] @ np.array(keys).T + np.array(bias)
                prob = np.exp(logits - logits.max(1, keepdims=True))
                expected = (prob / prob.sum(1, keepdims=True)) @ np.array(vals)
                found = out[view.b, tokens, view.h].double().numpy()
                np.testing.assert_allclose(found, expected, atol=2e-5)
    assert refined if similarity else len(met) >= 3, "too few levels, the case shows nothing"
    assert density == pytest.approx(np.mean(read))


def test_compensation_follows_the_call_and_what_a_pyramid_takes():
    with pytest.raises(ValueError, match=r"PooledMass follows the queries and keys of a call .* got Window"):
        Recipe(select=Window(), compensate=PooledMass())
    with pytest.raises(ValueError, match="four non-decreasing shares"):
        KeyPyramid(cumulative=(0.5, 0.4, 0.7, 0.8))
    with pytest.raises(ValueError, match="empty or three cosines"):
        KeyPyramid(similarity=(0.5,))
