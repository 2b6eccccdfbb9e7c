"""The share of token pairs that a mask shows, against the masks written out token by token."""

from __future__ import annotations

import pytest
import torch

from dit_accel import AttentionRunner, Recipe
from dit_accel.kernels.mask.block_mask import BlockMask
from dit_accel.layout import TokenLayout
from dit_accel.stages.order.simple import Raster, Tiles
from dit_accel.stages.select.pooled import Pooled
from dit_accel.stages.select.static import Window
from tests.stages.oracle import window_tokens

LAYOUTS = {
    "alone": TokenLayout((3, 7, 9), 0, 189),
    "text first": TokenLayout((3, 7, 9), 13, 202),
    "text last": TokenLayout((3, 7, 9), 0, 204),
}


def _run(recipe: Recipe, layout: TokenLayout) -> AttentionRunner:
    runner = AttentionRunner(recipe, layers=["a"])
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, layout.seq_len, 2, 16, generator=generator) for _ in range(3))

    def dense() -> torch.Tensor:
        raise AssertionError("the call was dense")

    with runner.forward(layout):
        runner.attend(0, q, k, v, dense)
    return runner


@pytest.mark.parametrize("order", [Raster(), Tiles((2, 4, 4))], ids=["raster", "tiles"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_window_counts_the_tokens_that_it_shows(name: str, order) -> None:
    layout = LAYOUTS[name]
    summary = _run(Recipe(order=order, select=Window(window=(2, 3, 5), block=(64, 32))), layout).summary()
    expected = window_tokens(layout, (2, 3, 5)).double().mean().item()
    assert summary.token_density == pytest.approx(expected, rel=1e-6)
    assert summary.token_density < 0.9 * summary.density
    assert summary.to_dict()["token_density"] == summary.token_density
    assert f"of which token masks show {summary.token_density / summary.density:.3f}" in " ".join(str(summary).split())


def test_without_token_masks_it_is_the_density() -> None:
    summary = _run(Recipe(select=Pooled(density=0.4, block=(64, 32))), LAYOUTS["text first"]).summary()
    assert summary.token_density == pytest.approx(summary.density)
    assert "token masks" not in str(summary)


@pytest.mark.parametrize(("q_len", "kv_len"), [(100, 70), (96, 64), (33, 190)])
def test_short_blocks_count_what_they_have(q_len: int, kv_len: int) -> None:
    nq, nk = -(-q_len // 32), -(-kv_len // 32)
    keep = torch.rand(2, 3, nq, nk, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = BlockMask.from_dense(keep, 32, 32, q_len, kv_len)
    expected = mask.to_tokens().double().mean().item()
    assert mask.token_density.item() == pytest.approx(expected, rel=1e-6)
