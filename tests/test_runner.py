"""The runner, for programs with a loop of their own: what it hands to the engine, and what it refuses."""

from __future__ import annotations

import threading

import pytest
import torch

import dit_accel
from dit_accel import AttentionRunner, Recipe, presets
from dit_accel.layout import LatentGrid, StepContext, TokenLayout
from dit_accel.stages.order.simple import Tiles
from dit_accel.stages.schedule import Schedule
from dit_accel.stages.select.pooled import Pooled
from dit_accel.stages.select.static import Window
from tests.stages.oracle import masked_attention, window_tokens

LAYOUT = TokenLayout((3, 7, 9), 5, 201)
REACH = (2, 3, 5)
WINDOW = Recipe(order=Tiles((2, 4, 4)), select=Window(window=REACH, block=(32, 32)))
POOLED = Recipe(
    order=Tiles((2, 4, 4)),
    select=Pooled(density=0.3, block=(32, 32)),
    schedule=Schedule(dense_fraction=0.25, refresh_every=8),
)


def _call(seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, LAYOUT.seq_len, 2, 16, generator=generator) * factor for factor in (1.5, 1.5, 1.0)]


def _fails() -> torch.Tensor:
    raise AssertionError("the call was dense")


@pytest.mark.parametrize("masked", [False, True])
def test_a_call_is_the_engines(masked: bool) -> None:
    runner = AttentionRunner(WINDOW, layers=["a"])
    q, k, v = _call()
    mask = torch.ones(1, LAYOUT.seq_len, dtype=torch.bool)
    mask[:, 197:] = False
    with runner.forward(LAYOUT):
        out = runner.attend(0, q, k, v, _fails, attn_mask=mask if masked else None, scale=0.2)
    seen = window_tokens(LAYOUT, REACH) & (mask if masked else True)
    # The oracle's scale is that of the head dimension.
    expected = masked_attention(q * (0.2 * 16**0.5), k, v, seen)
    assert (out.double() - expected).abs().max() <= 4e-6 * expected.abs().max()
    assert runner.summary().sparse_calls == 1
    runner.reset()
    assert runner.summary().sparse_calls == 0


def test_what_stays_dense_is_counted_with_the_reason() -> None:
    runner = AttentionRunner(WINDOW, layers=["a", "b"])
    q, k, v = _call()
    dense = torch.ones(1)
    assert runner.attend(0, q, k, v, lambda: dense) is dense
    with runner.forward(LAYOUT):
        assert runner.attend(1, q[:, :7], k, v, lambda: dense) is dense
        assert runner.attend(1, q[:, :7], k[:, :7], v[:, :7], lambda: dense) is dense
        assert runner.pass_by(1, "the program says so", lambda: dense) is dense
    with runner.forward(lambda length: f"{length} tokens of another kind"):
        assert runner.attend(1, q, k, v, lambda: dense) is dense
    first, second = runner.summary().layers
    assert first.dense_calls == {"called outside a forward of its transformer": 1}
    assert second.dense_calls == {
        "keys and queries differ in number": 1,
        "the layout is of 201 tokens, the call of 7": 1,
        "the program says so": 1,
        "201 tokens of another kind": 1,
    }


def _zeros() -> torch.Tensor:
    return torch.zeros(1, LAYOUT.seq_len, 2, 16)


def _steps(runner: AttentionRunner, branches=("cond", "uncond")) -> list[torch.Tensor]:
    outs = []
    for index in range(4):
        for branch in branches:
            with runner.forward(LAYOUT, StepContext(index, 4, 1 - index / 4, branch)):
                q, k, v = _call(sum(map(ord, branch)))
                outs.append(runner.attend(0, q, k, v, _zeros))
    return outs


def test_plans_are_of_a_run_and_of_a_branch() -> None:
    runner = AttentionRunner(POOLED, layers=["a"])
    for made in (2, 4):
        with runner.run():
            outs = _steps(runner)
        assert runner.summary().layers[0].plans_made == made
    assert not outs[0].any()  # the first of four steps is dense
    assert outs[2].any()
    assert runner.summary().dense_calls == {"dense phase": 4}


def test_threads_have_runs_of_their_own() -> None:
    runner = AttentionRunner(POOLED, layers=["a"])
    begun, outside = threading.Barrier(2, timeout=60), []

    def other() -> None:
        begun.wait()
        outside.append(runner.attend(0, *_call(), lambda: torch.zeros(1)))
        with runner.run():
            _steps(runner, ("x",))
        begun.wait()

    thread = threading.Thread(target=other)
    thread.start()
    with runner.run(), runner.forward(LAYOUT, StepContext(3, 4, 0.1, "x")):
        begun.wait()
        begun.wait()
        runner.attend(0, *_call(), _fails)
    thread.join()
    (layer,) = runner.summary().layers
    assert layer.plans_made == 2
    assert layer.dense_calls == {"called outside a forward of its transformer": 1, "dense phase": 1}
    assert outside[0].shape == (1,)


def test_references_are_other_tokens_where_a_recipe_knows_one_grid() -> None:
    layout = TokenLayout((1, 7, 9), 0, 126, (LatentGrid((1, 7, 9), 63),))
    seen = []
    for recipe in (WINDOW.with_fields({"select.window": (1, 3, 5)}), POOLED):
        runner = AttentionRunner(recipe, layers=["a"])
        runner.engine.observer = lambda call: seen.append(len(call.layout.references))
        with runner.forward(layout):
            runner.attend(0, *(x[:, :126] for x in _call()), _fails)
    assert seen == [0, 1]


def test_the_default_stays_dense_where_a_sequence_is_short() -> None:
    runner = AttentionRunner(layers=["a"], density=0.4)
    assert runner.recipe == presets.automatic(density=0.4)
    with runner.forward(LAYOUT, StepContext(3, 4, 0.1, "x")):
        runner.attend(0, *_call(), lambda: torch.zeros(1))
    summary = runner.summary()
    assert summary.dense_calls == {"201 tokens, too few to gain (below 2048)": 1}
    assert "no recipe was given" in str(summary)


@pytest.mark.parametrize(
    ("recipe", "options", "words"),
    [
        ("fast", {}, r"a reuse of blocks' results \(Listed\), which needs dit_accel.patch"),
        ("sla", {}, "weights that were trained"),
        ("paro", {}, "a calibration"),
        ("mass", {"density": 2.0}, "density"),
        ("mass", {"depth": 2}, "has no option 'depth'"),
        ("nothing", {}, "nothing"),
    ],
)
def test_recipes_that_are_refused(recipe: str, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AttentionRunner(recipe, layers=["a"], **options)


def test_other_arguments_that_are_refused() -> None:
    with pytest.raises(ValueError, match="Unknown backend 'cuda'"):
        AttentionRunner("mass", layers=["a"], backend="cuda")
    with pytest.raises(ValueError, match="at least one self-attention layer, got none"):
        AttentionRunner("mass", layers=[])
    assert dit_accel.AttentionRunner is AttentionRunner
