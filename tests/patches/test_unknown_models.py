"""Transformers of no known family: read off a call, declared from outside, or refused with what was looked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dit_accel
from dit_accel import Family, Recipe
from dit_accel.layout import TokenLayout
from dit_accel.patches.families import registry
from dit_accel.patches.families.family import read_video
from dit_accel.patches.families.general import EXAMPLE
from dit_accel.stages.order.simple import Tiles
from dit_accel.stages.select.static import FullSelect
from tests.recipes import POOLED
from tests.unknown_dit import UnknownTransformer

FULL = Recipe(order=Tiles((2, 2, 4)), select=FullSelect(block=(32, 32)))
VIDEO, IMAGE = (1, 4, 3, 8, 12), (1, 4, 12, 16)


@pytest.fixture(autouse=True)
def _nothing_registered(monkeypatch):
    monkeypatch.setattr(registry, "_declared", [])


def model_of(**config: Any) -> UnknownTransformer:
    torch.manual_seed(0)
    return UnknownTransformer(**config).eval()


@torch.no_grad()
def run(model: nn.Module, shape: tuple[int, ...] = VIDEO) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(shape, generator=generator), torch.randn(1, 7, 16, generator=generator)
    return model(latents, text, torch.tensor([500.0]))


@pytest.mark.parametrize(("shape", "grid"), [(VIDEO, (3, 4, 6)), (IMAGE, (1, 6, 8))])
def test_latents_are_read_off_their_shape(shape, grid):
    model = model_of()
    plain, calls = run(model, shape), []
    with dit_accel.patch(model, FULL) as handle, handle.observe(lambda _, call: calls.append(call)):
        assert torch.allclose(run(model, shape), plain, atol=1e-5)
        summary = handle.summary()
    assert {call.layout for call in calls if call.plan is not None} == {
        TokenLayout(grid, 0, grid[0] * grid[1] * grid[2])
    }
    assert summary.sparse_calls == 2
    # The attention to the prompt is left alone, and named.
    assert summary.dense_calls == {"keys and queries differ in number": 2}
    assert any("UnknownTransformer is of no known family" in note for note in summary.notes)
    assert torch.equal(run(model, shape), plain)


def test_a_sequence_with_other_tokens_stays_dense_with_a_reason():
    model = model_of(joint=True)
    plain = run(model)
    with dit_accel.patch(model, POOLED) as handle:
        assert torch.equal(run(model), plain)
        reasons = handle.summary().dense_calls
    assert reasons["7 other tokens lie beside the latents, and no Family says where"] == 2


def test_a_declared_family_says_where():
    dit_accel.register_family(Family("Mine", ("UnknownTransformer",), ("blocks.*.self_attn",), read_video))
    model = model_of(joint=True)
    plain = run(model)
    with dit_accel.patch(model, FULL) as handle:
        assert torch.allclose(run(model), plain, atol=1e-5)
        summary = handle.summary()
    assert summary.sparse_calls == 2
    assert not summary.dense_calls
    assert not any("no known family" in note for note in summary.notes)


def test_families_of_a_package(monkeypatch):
    class Entry:
        name = "mine"

        def __init__(self, value: Any) -> None:
            self.load = lambda: value

    mine = Family("Packaged", ("UnknownTransformer",), ("blocks.*.self_attn",), read_video)
    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry(mine)] if group == "dit_accel.families" else [])
    registry._of_entry_points.cache_clear()
    try:
        with dit_accel.patch(model_of(), POOLED) as handle:
            assert [layer.name for layer in handle.summary().layers] == ["blocks.0.self_attn", "blocks.1.self_attn"]
        registry._of_entry_points.cache_clear()
        monkeypatch.setattr(registry, "entry_points", lambda group: [Entry("no family")])
        with pytest.raises(TypeError, match=r"entry point 'mine' of dit_accel\.families must be a Family, got str"):
            dit_accel.patch(model_of(), POOLED)
    finally:
        registry._of_entry_points.cache_clear()


def test_what_cannot_be_registered():
    with pytest.raises(TypeError, match="register_family takes a Family, got str"):
        dit_accel.register_family("Mine")
    mine = Family("Mine", ("A", "B"), ("blocks.*",), read_video)
    dit_accel.register_family(mine)
    dit_accel.register_family(mine)  # twice is once
    assert registry.registered().count(mine) == 1
    with pytest.raises(ValueError, match=r"B is of the registered family 'Mine' already, got 'Other'"):
        dit_accel.register_family(Family("Other", ("B",), ("blocks.*",), read_video))


class NoLatents(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class NoProcessor(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (NoLatents(), "NoLatents is of no known family, and its forward takes no hidden_states"),
        (NoProcessor(), "NoProcessor is of no known family, and none of its modules has an attention processor"),
    ],
)
def test_what_is_refused_says_what_was_looked_for_and_how_to_declare_it(model, why):
    with pytest.raises(ValueError, match=why) as caught:
        dit_accel.patch(model)
    assert EXAMPLE in str(caught.value)
    names: dict[str, Any] = {}
    exec(EXAMPLE, names)  # what users are shown runs
    assert registry.registered()[0].name == "Mine"
