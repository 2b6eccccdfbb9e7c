"""A cache of another package on a patched pipeline: one of diffusers, and cache-dit where it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig

import dit_accel
from dit_accel import Recipe
from dit_accel.stages.reuse.listed import Listed
from dit_accel.stages.schedule import Schedule
from tests.patches.test_reuse import build
from tests.peaked import RECIPES
from tests.recipes import POOLED
from tests.tiny import TINY

BRANCHES = 2
AGED = replace(POOLED, schedule=Schedule(refresh_every=2))


def _ran(pipe: Any, steps: int) -> tuple[torch.Tensor, list[list[int]]]:
    """The latents of a run, and the steps in which each block ran in the first branch."""
    found: list[list[int]] = [[] for _ in pipe.transformer.blocks]

    def note(number: int) -> Any:
        def hook(*_: Any) -> None:
            found[number].append(pipe.scheduler.step_index or 0)

        return hook

    hooks = [block.attn1.register_forward_hook(note(number)) for number, block in enumerate(pipe.transformer.blocks)]
    out = TINY["wan"].run(pipe, steps=steps)
    for hook in hooks:
        hook.remove()
    return out, [sorted(set(steps)) for steps in found]


def test_plans_age_by_the_forwards_in_which_their_layer_ran() -> None:
    pipe = build()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(0.3))
    with dit_accel.patch(pipe, AGED) as handle:
        _, ran = _ran(pipe, 9)
        layers = handle.summary().layers
    assert len(ran[0]) == 9 > len(ran[-1]) > 1
    for layer, steps in zip(layers, ran, strict=True):
        assert layer.plans_made == BRANCHES * -(-len(steps) // 2)


@pytest.fixture
def cache_dit() -> Any:
    return pytest.importorskip("cache_dit", reason="the extra dit-accel[cache] is not installed")


@pytest.fixture
def pipe(cache_dit: Any) -> Iterator[Any]:
    made = build()
    yield made
    # What it leaves on the class of the pipeline would meet the next test.
    cache_dit.disable_cache(made)


def _enable(cache_dit: Any, pipe: Any) -> None:
    """Every second step is skipped behind the second, all blocks but the first."""
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=2,
        max_continuous_cached_steps=1,
        residual_diff_threshold=100.0,
        enable_separate_cfg=True,
    )
    cache_dit.enable_cache(pipe, cache_config=config)


def test_it_skips_what_it_skips_alone(cache_dit: Any, pipe: Any) -> None:
    plain = TINY["wan"].run(pipe, steps=9)
    _enable(cache_dit, pipe)
    expected, alone = _ran(pipe, 9)
    assert not torch.equal(expected, plain)
    assert alone[0] == list(range(9))
    assert 2 < len(alone[-1]) < 9
    with dit_accel.patch(pipe, "dense"):
        found, beside = _ran(pipe, 9)
    assert torch.equal(found, expected)
    assert beside == alone


@pytest.mark.parametrize("recipe", [AGED, RECIPES["mass"]], ids=["aged", "mass"])
def test_either_order_gives_the_same(cache_dit: Any, pipe: Any, recipe: Recipe) -> None:
    _enable(cache_dit, pipe)
    with dit_accel.patch(pipe, recipe) as handle:
        expected, _ = _ran(pipe, 9)
        counts = [(one.plans_made, one.sparse_calls) for one in handle.summary().layers]
    cache_dit.disable_cache(pipe)
    other = build()
    with dit_accel.patch(other, recipe) as handle:
        _enable(cache_dit, other)
        found, _ = _ran(other, 9)
        assert [(one.plans_made, one.sparse_calls) for one in handle.summary().layers] == counts
        cache_dit.disable_cache(other)
    assert torch.equal(found, expected)
    assert all(sparse > 0 for _, sparse in counts)


def test_plans_age_by_computed_steps(cache_dit: Any, pipe: Any) -> None:
    _enable(cache_dit, pipe)
    with dit_accel.patch(pipe, AGED) as handle:
        _, ran = _ran(pipe, 9)
        layers = handle.summary().layers
    for layer, steps in zip(layers, ran, strict=True):
        assert layer.sparse_calls == BRANCHES * len(steps)
        assert layer.plans_made == BRANCHES * -(-len(steps) // 2)


def test_a_search_is_in_a_step_in_which_its_layer_runs(cache_dit: Any, pipe: Any) -> None:
    """Of nine steps the third is the last dense one, which the cache skips behind the first block."""
    recipe = RECIPES["mass"].with_fields({"schedule.refresh_every": 9})
    _enable(cache_dit, pipe)
    with dit_accel.patch(pipe, recipe) as handle:
        _, ran = _ran(pipe, 9)
        summary = handle.summary()
    assert 2 in ran[0]
    assert 2 not in ran[-1]
    assert summary.dense_calls["search step"] == BRANCHES * len(ran)
    for layer, steps in zip(summary.layers, ran, strict=True):
        assert layer.plans_made == BRANCHES
        behind = [step for step in steps if step >= 2][1:]
        assert layer.sparse_calls == BRANCHES * len(behind)


def test_a_second_run_with_other_steps_starts_clean(cache_dit: Any, pipe: Any) -> None:
    _enable(cache_dit, pipe)
    with dit_accel.patch(pipe, RECIPES["mass"]):
        found = [_ran(pipe, steps)[0] for steps in (9, 5, 9)]
    cache_dit.disable_cache(pipe)
    for steps, one in zip((9, 5, 9), found, strict=True):
        fresh = build()
        _enable(cache_dit, fresh)
        with dit_accel.patch(fresh, RECIPES["mass"]):
            assert torch.equal(_ran(fresh, steps)[0], one)
        cache_dit.disable_cache(fresh)


@pytest.mark.parametrize("first", ["patch", "cache"])
def test_removal_restores(cache_dit: Any, pipe: Any, first: str) -> None:
    plain, call = TINY["wan"].run(pipe, steps=6), type(pipe).__call__
    _enable(cache_dit, pipe)
    cached = TINY["wan"].run(pipe, steps=6)
    handle = dit_accel.patch(pipe, POOLED)
    assert not torch.equal(TINY["wan"].run(pipe, steps=6), cached)
    if first == "patch":
        handle.remove()
        assert torch.equal(TINY["wan"].run(pipe, steps=6), cached)
        cache_dit.disable_cache(pipe)
    else:
        cache_dit.disable_cache(pipe)
        handle.remove()
    assert torch.equal(TINY["wan"].run(pipe, steps=6), plain)
    assert type(pipe).__call__ is call


@pytest.mark.parametrize("first", ["patch", "cache"])
def test_beside_the_recipes_own_reuse_it_is_refused(cache_dit: Any, pipe: Any, first: str) -> None:
    recipe = Recipe(reuse=Listed((0,), 9))
    if first == "cache":
        _enable(cache_dit, pipe)
        with pytest.raises(ValueError, match=r"has a cache already \(of cache-dit"):
            dit_accel.patch(pipe, recipe)
        return
    with dit_accel.patch(pipe, recipe):
        _enable(cache_dit, pipe)
        with pytest.raises(ValueError, match="two would answer for each other"):
            TINY["wan"].run(pipe, steps=3)
        cache_dit.disable_cache(pipe)
        assert TINY["wan"].run(pipe, steps=3).isfinite().all()
