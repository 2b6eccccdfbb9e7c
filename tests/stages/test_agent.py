"""Agent tokens against the equations, token by token in float64."""

import itertools

import pytest
import torch

from dit_accel import presets
from dit_accel.call import AttentionInputs
from dit_accel.engine import Engine
from dit_accel.layout import StepContext
from dit_accel.stages.compensate.agent import AgentTokens
from tests.calls import attend
from tests.stages.block_oracle import LAYOUTS, half_hidden, inputs


def _attention(q, k, v, scale, visible):
    logits = (q @ k.T * scale).masked_fill(~visible, -torch.inf)
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("tile", [(2, 2, 2), (1, 3, 4)], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_agents(name, tile, hidden):
    layout = LAYOUTS[name]
    q, k = inputs(layout)
    v = torch.randn(q.shape, generator=torch.Generator().manual_seed(2))
    key_mask = half_hidden(layout) if hidden else None
    engine = Engine(presets.agent(tile=tile, dense_fraction=0.0), ["layer"], "auto", 0)
    out = attend(engine, 0, AttentionInputs(q, k, v, key_mask), layout, StepContext(), lambda: pytest.fail("ran dense"))
    frames, height, width = layout.grid
    if name == "image" and tile == (2, 2, 2):
        tile = (1, 4, 2)  # an image folds the tile's frames into its height
    groups = {}
    for n, (f, h, w) in enumerate(itertools.product(range(frames), range(height), range(width))):
        groups.setdefault((f // tile[0], h // tile[1], w // tile[2]), []).append(layout.latent_start + n)
    latent = [n for members in groups.values() for n in members]
    others = [n for n in range(layout.seq_len) if n not in latent]
    scale = q.shape[-1] ** -0.5
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
        queries, keys, values = (x[b, :, h].double() for x in (q, k, v))
        visible = torch.ones(layout.seq_len, dtype=torch.bool) if key_mask is None else key_mask[b]
        agents = torch.stack([queries[members].mean(0) for members in groups.values()])
        told = _attention(agents, keys, values, scale, visible)
        expected = torch.empty_like(values)
        all_agents = torch.ones(len(groups), dtype=torch.bool)
        expected[latent] = _attention(queries[latent], agents, told, scale**0.3, all_agents) + 0.075 * values[latent]
        expected[others] = _attention(queries[others], keys, values, scale, visible)
        assert (out[b, :, h].double() - expected).abs().max() <= 4e-6 * expected.abs().max()
    products = len(groups) * (layout.seq_len + len(latent)) + len(others) * layout.seq_len
    assert float(engine.records[0].density_sum) == pytest.approx(products / layout.seq_len**2)


def test_gradients_reach_queries_keys_and_values():
    layout = LAYOUTS["text first"]
    q, k = (x.requires_grad_() for x in inputs(layout))
    v = torch.randn(q.shape, requires_grad=True)
    engine = Engine(presets.agent(), ["layer"], "auto", 0)
    out = attend(engine, 0, AttentionInputs(q, k, v), layout, StepContext(), lambda: pytest.fail("ran dense"))
    out.square().sum().backward()
    assert all(bool(x.grad.abs().sum() > 0) for x in (q, k, v))


def test_agents_that_save_nothing_are_refused():
    with pytest.raises(ValueError, match="more than two tokens"):
        AgentTokens(tile=(1, 1, 2))
