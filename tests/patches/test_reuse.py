"""What a forward takes from earlier steps: the right thing, of its own run and branch, and never unseen."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig
from torch import nn

import dit_accel
from dit_accel import Recipe
from dit_accel.stages.reuse.energy import Energy
from dit_accel.stages.reuse.first_block import FirstBlock
from dit_accel.stages.reuse.forecast import Forecast
from dit_accel.stages.reuse.listed import Listed
from dit_accel.stages.reuse.magnitude import Magnitude
from tests.peaked import RECIPES, peaked_pipeline
from tests.recipes import POOLED
from tests.tiny import TINY

LISTED = Recipe(reuse=Listed((0, 1, 4), 7))
KINDS = {
    "first_block": FirstBlock(0.3),
    "magnitude": Magnitude(0.5, 2, 0.0, (1.0, 1.01, 0.98, 1.02)),
    "forecast": Forecast(interval=3, warmup=2),
    "energy": Energy(2.0),
    "listed": Listed((0, 1, 4), 7),
    "guided": Listed((0, 1, 2, 4, 5, 6), 7, guided=(0, 2, 5)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(family: str = "wan", layers: int = 3) -> Any:
    """A pipeline that computes in float64."""
    pipe = peaked_pipeline(TINY[family].build(layers))
    for name, part in pipe.components.items():
        if name.startswith("transformer") and part is not None:
            part.double()
    return pipe


class _Added(nn.Module):
    """In place of all blocks: what they added before."""

    def __init__(self, *added: torch.Tensor) -> None:
        super().__init__()
        self.added = added

    def forward(self, *streams: torch.Tensor, **_: Any) -> Any:
        out = tuple(stream + one for stream, one in zip(streams, self.added, strict=False))
        return out if len(out) > 1 else out[0]


class ByHand:
    """Reuse written by hand around a transformer's forward, for one order of forwards: branches of a step in turn."""

    def __init__(self, model: Any, lists: list[str], computed: set[int], branches: int) -> None:
        self.model, self.lists, self.computed, self.branches = model, lists, computed, branches
        self.first = getattr(model, lists[0])[0]
        self.last = getattr(model, lists[-1])[-1]
        self.forward, self.number = model.forward, 0
        self.kept: dict[int, tuple[torch.Tensor, ...]] = {}
        model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step, branch = divmod(self.number, self.branches)
        self.number += 1
        return self._compute(branch, args, kwargs) if step in self.computed else self._reuse(branch, args, kwargs)

    def _compute(self, branch: int, args: Any, kwargs: Any) -> Any:
        seen: dict[str, Any] = {}
        hooks = (
            self.first.register_forward_pre_hook(lambda module, args: seen.update(given=args[: self._streams()])),
            self.last.register_forward_hook(lambda module, args, out: seen.update(out=out)),
        )
        out = self.forward(*args, **kwargs)
        for hook in hooks:
            hook.remove()
        left = seen["out"] if isinstance(seen["out"], tuple) else (seen["out"],)
        self.kept[branch] = tuple(one - given for one, given in zip(left, seen["given"], strict=True))
        return out

    def _streams(self) -> int:
        return 2 if len(self.lists) > 1 else 1

    def _reuse(self, branch: int, args: Any, kwargs: Any) -> Any:
        before = {name: getattr(self.model, name) for name in self.lists}
        for name in self.lists:
            setattr(self.model, name, nn.ModuleList())
        setattr(self.model, self.lists[0], nn.ModuleList([_Added(*self.kept[branch])]))
        out = self.forward(*args, **kwargs)
        for name, blocks in before.items():
            setattr(self.model, name, blocks)
        return out


@pytest.mark.parametrize(
    ("family", "lists", "branches"),
    [("wan", ["blocks"], 2), ("hunyuan", ["transformer_blocks", "single_transformer_blocks"], 1)],
)
def test_listed_steps_are_a_loop_written_by_hand(family: str, lists: list[str], branches: int) -> None:
    tiny = TINY[family]
    pipe = build(family)
    plain = tiny.run(pipe, steps=7)
    ByHand(pipe.transformer, lists, {0, 1, 4}, branches)
    expected = tiny.run(pipe, steps=7)
    del pipe.transformer.forward
    assert not torch.equal(expected, plain)
    with dit_accel.patch(pipe, LISTED) as handle:
        found = tiny.run(pipe, steps=7)
        summary = handle.summary()
    # Two float64 computations that end in a float32 latent.
    assert (found - expected).abs().max() <= 2 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (summary.computed_forwards, summary.skipped_forwards) == (3 * branches, 4 * branches)
    assert summary.computed_share == 3 / 7
    assert f"forwards: {3 * branches} computed, {4 * branches} skipped" in str(summary)
    layers = len(summary.layers)
    assert sum(summary.dense_calls.values()) == 3 * branches * layers


class Continued(ByHand):
    """The same by hand, where a line at half its slope goes on, and all is made good that it was off."""

    def __init__(self, pipe: Any, lists: list[str], computed: set[int], branches: int, num_steps: int) -> None:
        super().__init__(pipe.transformer, lists, computed, branches)
        self.pipe, self.num_steps = pipe, num_steps
        self.history: dict[int, list[tuple[int, torch.Tensor]]] = {}

    def _compute(self, branch: int, args: Any, kwargs: Any) -> Any:
        out = super()._compute(branch, args, kwargs)
        self.history.setdefault(branch, []).append(((self.number - 1) // self.branches, self.kept[branch][0]))
        return out

    def _reuse(self, branch: int, args: Any, kwargs: Any) -> Any:
        step, known = (self.number - 1) // self.branches, self.history[branch]
        far = [float(one) for one in self.pipe.scheduler.sigmas.double().diff().abs()]
        value = self._line(known, step)
        if len(known) > 1:
            (before, then), (last, now) = known[-2:]
            skipped = range(before + 1, last)
            debt = sum(
                far[one] * (then + (now - then) * (one - before) / (last - before) - self._line(known[:-1], one))
                for one in skipped
            )
            upcoming = min((one for one in self.computed if one > step), default=self.num_steps)
            ahead = sum(far[last + 1 : upcoming])
            assert ahead > sum(far[one] for one in skipped) / 3.0  # none is so short that less is made good
            value = value + debt / ahead
        self.kept[branch] = (value,)
        return super()._reuse(branch, args, kwargs)

    @staticmethod
    def _line(known: list[tuple[int, torch.Tensor]], step: int) -> torch.Tensor:
        if len(known) < 2:
            return known[-1][1]
        (before, then), (last, now) = known[-2:]
        return now + 0.5 * (now - then) * (step - last) / (last - before)


def test_a_list_makes_good_what_its_line_was_off() -> None:
    computed, steps = (0, 2, 5, 8), 11
    pipe = build()
    listed = Listed(computed, steps, order=1, slope=0.5)
    found = {}
    for correction in (0.0, 1.0):
        with dit_accel.patch(pipe, Recipe(reuse=replace(listed, correction=correction))):
            found[correction] = TINY["wan"].run(pipe, steps=steps)
    Continued(pipe, ["blocks"], set(computed), 2, steps)
    expected = TINY["wan"].run(pipe, steps=steps)
    del pipe.transformer.forward
    # Two float64 computations that end in a float32 latent.
    tolerance = 2 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (found[1.0] - expected).abs().max() <= tolerance
    assert (found[0.0] - expected).abs().max() > 100 * tolerance


# What diffusers does of itself, in a run for which its cache is set up by hand.
OWN: dict[str, tuple[Any, Any]] = {
    "first_block": (FirstBlock(0.3), FirstBlockCacheConfig(0.3)),
    "magnitude": (
        Magnitude(0.5, 2, 0.2, (1.0, 1.1, 0.9, 1.2, 0.8, 1.0)),
        MagCacheConfig(0.5, 2, 0.2, 6, [1.0, 1.1, 0.9, 1.2, 0.8, 1.0]),
    ),
    "forecast": (
        Forecast(3, 2, 2),
        TaylorSeerCacheConfig(
            3,
            2,
            max_order=2,
            taylor_factors_dtype=torch.float64,
            skip_predict_identifiers=[r"blocks\.[01]"],
            cache_identifiers=[r"blocks\.2"],
        ),
    ),
    "energy": (Energy(0.6), SeaCacheConfig(0.6)),
}


@pytest.mark.parametrize("kind", OWN)
def test_a_run_is_what_diffusers_own_cache_gives(kind: str) -> None:
    tiny, (stage, config) = TINY["wan"], OWN[kind]
    pipe = build()
    plain = tiny.run(pipe, steps=6)
    pipe.transformer.enable_cache(config)
    expected = tiny.run(pipe, steps=6)
    pipe.transformer.disable_cache()
    assert not torch.equal(expected, plain)
    with dit_accel.patch(pipe, Recipe(reuse=stage)) as handle:
        assert torch.equal(tiny.run(pipe, steps=6), expected)
        assert handle.summary().skipped_forwards > 0
    assert torch.equal(tiny.run(pipe, steps=6), plain)


@every_kind
def test_a_second_run_with_other_steps_size_or_prompt_starts_clean(kind: str) -> None:
    tiny = TINY["wan"]
    recipe = replace(RECIPES["mass"], reuse=KINDS[kind])
    other_prompt = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(5))
    calls: list[dict[str, Any]] = [
        {"steps": 7},
        {"steps": 5},
        {"steps": 5, "height": 112, "width": 96},
        {"steps": 7, "prompt_embeds": other_prompt},
        {"steps": 7, "guidance_scale": 1.0},
        {"steps": 7},
    ]
    pipe = build()
    with dit_accel.patch(pipe, recipe) as handle:
        for call in calls:
            found = tiny.run(pipe, **call)
            fresh = build()
            dit_accel.patch(fresh, recipe)
            assert torch.equal(found, tiny.run(fresh, **call)), call
        assert handle.summary().skipped_forwards > 0


@every_kind
def test_removal_leaves_no_trace(kind: str) -> None:
    tiny, pipe = TINY["wan"], build()
    plain = tiny.run(pipe, steps=5)
    before = {path: (type(module), set(vars(module))) for path, module in pipe.transformer.named_modules()}
    state = pipe.transformer.state_dict()
    handle = dit_accel.patch(pipe, replace(POOLED, reuse=KINDS[kind]))
    assert list(pipe.transformer.state_dict()) == list(state)
    assert not torch.equal(tiny.run(pipe, steps=5), plain)
    handle.remove()
    assert {path: (type(module), set(vars(module))) for path, module in pipe.transformer.named_modules()} == before
    assert torch.equal(tiny.run(pipe, steps=5), plain)


@every_kind
def test_a_run_that_has_ended_holds_no_results_of_blocks(kind: str) -> None:
    # Another test of the process may hold some.
    pipe, held, others = build(), [], _tokens_alive()

    def count(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        held.append(_tokens_alive() - others)
        return values

    with dit_accel.patch(pipe, replace(POOLED, reuse=KINDS[kind])):
        TINY["wan"].run(pipe, steps=5, callback_on_step_end=count)
        assert _tokens_alive() == others
    assert held[-2] > 0
    assert held[-1] == 0


def _tokens_alive() -> int:
    """Tensors of the shape that blocks pass on: 126 tokens of 24 features."""
    gc.collect()
    return sum(isinstance(one, torch.Tensor) and one.shape == (1, 126, 24) for one in gc.get_objects())


@every_kind
def test_disabled_is_the_dense_model(kind: str) -> None:
    tiny, pipe = TINY["wan"], build()
    plain = tiny.run(pipe, steps=5)
    with dit_accel.patch(pipe, replace(POOLED, reuse=KINDS[kind])) as handle:
        with handle.disabled():
            assert torch.equal(tiny.run(pipe, steps=5), plain)
        assert handle.summary().computed_share is None


@every_kind
def test_copies_and_pickles_are_not_patched(kind: str) -> None:
    pipe = build()
    with torch.no_grad():
        given = {
            "hidden_states": torch.randn(1, 16, 3, 12, 14, dtype=torch.float64),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 16, 32, dtype=torch.float64),
        }
        plain = pipe.transformer(**given).sample
        with dit_accel.patch(pipe, replace(POOLED, reuse=KINDS[kind])):
            TINY["wan"].run(pipe, steps=2)
            twins = [copy.deepcopy(pipe.transformer), pickle.loads(pickle.dumps(pipe.transformer))]
        for twin in twins:
            assert torch.equal(twin(**given).sample, plain)
            with dit_accel.patch(twin, "dense"):
                assert torch.equal(twin(**given).sample, plain)


@every_kind
def test_pipelines_in_threads_share_nothing(kind: str) -> None:
    """Two runs at once, of one transformer, in step with one another."""
    tiny, recipe = TINY["wan"], replace(RECIPES["mass"], reuse=KINDS[kind])
    calls: list[dict[str, Any]] = [{"steps": 7}, {"steps": 7, "height": 112, "width": 96, "guidance_scale": 2.0}]
    alone = []
    for call in calls:
        fresh = build()
        dit_accel.patch(fresh, recipe)
        alone.append(tiny.run(fresh, **call))
    pipe = build()
    found: dict[int, torch.Tensor] = {}
    turns = threading.Barrier(2, timeout=60)

    def in_step(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        turns.wait()
        return values

    def target(index: int) -> None:
        runner = type(pipe)(**pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)})
        found[index] = tiny.run(runner, callback_on_step_end=in_step, **calls[index])

    with dit_accel.patch(pipe, recipe):
        threads = [threading.Thread(target=target, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index in range(2):
        assert torch.equal(found[index], alone[index])
