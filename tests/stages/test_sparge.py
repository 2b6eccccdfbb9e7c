"""SpargeAttn against its equations."""

import numpy as np
import pytest
import torch

from dit_accel.kernels.selection.api import self_similarity
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.select.similarity_gate import GatedPooled
from tests.stages.block_oracle import (
    CPU,
    LAYOUTS,
    best,
    cases,
    fewest,
    half_hidden,
    per_head,
    selected,
    views,
)


def _coherent(layout, seed=5):
    """Queries and keys that follow smooth directions in some stretches and none in others."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, layout.seq_len, 3, 16)
    tensors = []
    for _ in range(2):
        noise = torch.randn(shape, generator=generator)
        direction = torch.randn(2, layout.seq_len // 16 + 1, 3, 16, generator=generator)
        smooth = direction.repeat_interleave(16, 1)[:, : layout.seq_len] * 2.0
        loudness = torch.rand(2, layout.seq_len // 40 + 1, 1, 1, generator=generator)
        loudness = loudness.repeat_interleave(40, 1)[:, : layout.seq_len] * 2.0
        tensors.append(smooth + noise * loudness)
    return tensors[0], tensors[1] + 0.5


def _cosine(x: np.ndarray) -> float:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return float((unit @ unit.T).mean())


def _sparge(view, density, top_p, similarity, forced):
    k = view.k - view.k[view.visible].mean(0)
    text = set(range(len(view.k_blocks))) - set(view.candidates)
    loose_k = {j for j in view.candidates if _cosine(k[view.alive[j]]) <= similarity}
    forced.append(len(loose_k))
    chosen = []
    for tokens in view.q_blocks:
        if _cosine(view.q[tokens]) <= similarity:
            forced.append(1)
            chosen.append(set(range(len(view.k_blocks))))
            continue
        mean = view.q[tokens].mean(0)
        scores = {j: view.scale * float(mean @ k[view.alive[j]].mean(0)) for j in view.candidates if j not in loose_k}
        picked = set(loose_k) | text
        if density is not None and scores:
            picked |= best(scores, density)
        if top_p is not None:
            picked |= fewest(scores, top_p)
        chosen.append(picked)
    return chosen


@pytest.mark.parametrize(("name", "order", "hidden"), cases(Raster(), Tiles((2, 4, 4))), ids=str)
@pytest.mark.parametrize(("density", "top_p"), [(None, 0.6), (0.4, None), (0.2, 0.3)], ids=str)
def test_sparge(name, order, hidden, density, top_p):
    layout, block, similarity = LAYOUTS[name], (64, 32), 0.2
    q, k = _coherent(layout)
    key_mask = half_hidden(layout) if hidden else None
    rows = order.rows(layout, CPU)
    forced: list[int] = []
    expected = per_head(
        lambda view: _sparge(view, density, top_p, similarity, forced),
        views(layout, rows, q, k, block, key_mask),
    )
    assert any(forced), "the gate closed nowhere, the case shows nothing"
    select = GatedPooled(density=density, top_p=top_p, similarity=similarity, block=block)
    assert torch.equal(selected(select, layout, rows, q, k, key_mask), expected)


def test_a_short_last_block_is_judged_by_the_tokens_it_has():
    x = torch.randn(1, 40, 1, 8, dtype=torch.float64)
    found = self_similarity(x, 32)[0, 0].tolist()
    assert found == pytest.approx([_cosine(x[0, :32, 0].numpy()), _cosine(x[0, 32:, 0].numpy())])


def test_hidden_keys_sway_neither_means_nor_gate():
    layout = LAYOUTS["text last"]
    q, k = _coherent(layout)
    key_mask = torch.ones(2, layout.seq_len, dtype=torch.bool)
    key_mask[:, 195:] = False
    wild = k.clone()
    wild[:, 195:] = torch.nan
    select = GatedPooled(similarity=0.2, top_p=0.5, block=(32, 32))
    assert torch.equal(
        selected(select, layout, None, q, k, key_mask), selected(select, layout, None, q, wild, key_mask)
    )


def test_a_closed_gate_keeps_everything_and_an_open_one_nothing_extra():
    layout = LAYOUTS["alone"]
    q, k = _coherent(layout)
    assert selected(GatedPooled(similarity=0.999, block=(32, 32)), layout, None, q, k).all()
    open_gate = GatedPooled(similarity=-1.0, density=0.2, top_p=None, block=(32, 32))
    assert not selected(open_gate, layout, None, q, k).all(-1).any()
