"""Steps at which one guidance branch runs the blocks, and the other takes the difference to it from an earlier step."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

import dit_accel
from dit_accel import Recipe
from dit_accel.layout import StepContext
from dit_accel.stages.reuse.listed import Listed
from tests.patches.test_reuse import ByHand, build
from tests.peaked import RECIPES
from tests.recipes import POOLED
from tests.tiny import TINY

COMPUTED, GUIDED = (0, 1, 2, 4, 5, 7), (0, 2, 5)
STAGE = Listed(COMPUTED, 9, guided=GUIDED)
# Two float64 computations that end in a float32 latent.
EPS = 2 * torch.finfo(torch.float32).eps


class GuidedByHand(ByHand):
    """The second branch adds what the first one adds, less the difference of the two when both were computed last."""

    def __init__(self, model: Any, lists: list[str], order: int = 0) -> None:
        super().__init__(model, lists, set(COMPUTED), 2)
        self.order = order
        self.before: dict[int, list[tuple[int, tuple[torch.Tensor, ...]]]] = {0: [], 1: []}
        self.apart = torch.zeros(())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step, branch = divmod(self.number, 2)
        self.number += 1
        if step not in self.computed:
            self.kept[branch] = self._continued(branch, step)
            return self._reuse(branch, args, kwargs)
        if branch == 1 and step not in GUIDED:
            _, (_, *others) = self.before[1][-1]
            self.kept[1] = (self.kept[0][0] - self.apart, *others)
            out = self._reuse(1, args, kwargs)
        else:
            out = self._compute(branch, args, kwargs)
            if branch == 1:
                self.apart = self.kept[0][0] - self.kept[1][0]
        self.before[branch].append((step, self.kept[branch]))
        return out

    def _continued(self, branch: int, step: int) -> tuple[torch.Tensor, ...]:
        last, added = self.before[branch][-1]
        if self.order == 0 or len(self.before[branch]) < 2:
            return added
        earlier, old = self.before[branch][-2]
        return tuple(now + (now - then) * (step - last) / (last - earlier) for now, then in zip(added, old))


# Guidance beside the embedded one, by a prompt of another length.
NEGATIVE = {
    "true_cfg_scale": 2.0,
    "negative_prompt_embeds": torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(3)),
    "negative_pooled_prompt_embeds": torch.randn(1, 8, generator=torch.Generator().manual_seed(4)),
    "negative_prompt_attention_mask": torch.ones(1, 6, dtype=torch.long),
}


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(
    ("family", "lists", "call"),
    [("wan", ["blocks"], {}), ("hunyuan", ["transformer_blocks", "single_transformer_blocks"], NEGATIVE)],
)
def test_a_run_is_a_loop_written_by_hand(family: str, lists: list[str], call: dict[str, Any], order: int) -> None:
    tiny, pipe = TINY[family], build(family)
    GuidedByHand(pipe.transformer, lists, order)
    expected = tiny.run(pipe, steps=9, **call)
    del pipe.transformer.forward
    with dit_accel.patch(pipe, Recipe(reuse=replace(STAGE, order=order))) as handle:
        found = tiny.run(pipe, steps=9, **call)
        summary = handle.summary()
    assert (found - expected).abs().max() <= EPS * expected.abs().max()
    assert (summary.computed_forwards, summary.skipped_forwards) == (6 + 3, 3 + 6)
    assert not any("guided" in note for note in summary.notes)
    with dit_accel.patch(pipe, Recipe(reuse=Listed(COMPUTED, 9, order))):
        both = tiny.run(pipe, steps=9, **call)
    assert (both - expected).abs().max() > 100 * EPS * expected.abs().max()


def _ran(pipe: Any, recipe: Recipe, **call: Any) -> tuple[list[tuple[int, int]], Any]:
    """(step, forwards that ran the last block) of a run, and its summary."""
    found: dict[int, int] = {}

    def count(*_: Any) -> None:
        step = pipe.scheduler.step_index or 0
        found[step] = found.get(step, 0) + 1

    hook = pipe.transformer.blocks[-1].register_forward_hook(count)
    with dit_accel.patch(pipe, recipe) as handle:
        TINY["wan"].run(pipe, **call)
        summary = handle.summary()
    hook.remove()
    return sorted(found.items()), summary


def test_both_branches_run_where_a_plan_is_made() -> None:
    """The search is in the last of three dense steps, which is not guided here."""
    stage = replace(STAGE, guided=(0, 5))
    found, summary = _ran(build(), replace(RECIPES["mass"], reuse=stage), steps=9)
    assert dict(found) == {step: 2 if step in (0, 2, 5) else 1 for step in COMPUTED}
    assert {layer.plans_made for layer in summary.layers} == {2}


def test_without_guidance_nothing_changes() -> None:
    tiny, pipe = TINY["wan"], build()
    with dit_accel.patch(pipe, Recipe(reuse=Listed(COMPUTED, 9))):
        expected = tiny.run(pipe, steps=9, guidance_scale=1.0)
    with dit_accel.patch(pipe, Recipe(reuse=STAGE)) as handle:
        assert torch.equal(tiny.run(pipe, steps=9, guidance_scale=1.0), expected)
        assert not handle.summary().notes


@pytest.mark.parametrize("family", ["ltx", "sd3"])
def test_branches_in_one_batch_are_said(family: str) -> None:
    tiny, pipe = TINY[family], TINY[family].build()
    with dit_accel.patch(pipe, Recipe(reuse=Listed(COMPUTED, 9))):
        expected = tiny.run(pipe, steps=4)
    with dit_accel.patch(pipe, Recipe(reuse=STAGE)) as handle:
        assert torch.equal(tiny.run(pipe, steps=4), expected)
        assert any("reuse.guided spares nothing: each step is one forward" in note for note in handle.summary().notes)


def test_a_changed_prompt_of_either_branch_parts_them_anew() -> None:
    """The difference is that of the two prompts: at step 4, where one branch would run, both do."""
    new = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(7))
    for name in ("prompt_embeds", "negative_prompt_embeds"):

        def change(pipe: Any, step: int, timestep: Any, values: dict[str, Any], name: str = name) -> dict[str, Any]:
            if step == 3:
                values[name] = new.to(values[name])
            return values

        call = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": [name]}
        found, _ = _ran(build(), Recipe(reuse=STAGE), steps=9, **call)
        assert dict(found)[4] == 2, name


def _by_hand(pipe: Any, steps: int, fails: Any = None, drift: float = 0.0, until: int = 99) -> dict[int, int]:
    """A denoising loop of two branches, without names, ``until`` a step of one; how many ran the last block in each."""
    prompts = [torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(n)).double() for n in range(2)]
    latents = torch.randn(1, 16, 3, 12, 14, generator=torch.Generator().manual_seed(9)).double()
    ran: dict[int, int] = {}
    hook = pipe.transformer.blocks[-1].register_forward_hook(lambda *_: ran.update({step: ran.get(step, 0) + 1}))
    pipe.scheduler.set_timesteps(steps)
    for step, timestep in enumerate(pipe.scheduler.timesteps):
        out = []
        for branch, prompt in enumerate(prompts if step < until else prompts[:1]):
            given = latents if branch == 0 else latents + drift
            if fails == (step, branch):
                with pytest.raises(RuntimeError, match="enough"):
                    _failing(pipe.transformer, given, timestep, prompt)
            out.append(pipe.transformer(given, timestep[None], prompt, return_dict=False)[0])
        pipe.scheduler._step_index = step + 1
        latents = latents + 0.1 * (out[-1] + 2 * (out[0] - out[-1]))
    hook.remove()
    return ran


def _failing(model: Any, latents: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("enough")

    hook = model.blocks[1].register_forward_pre_hook(fail)
    try:
        model(latents, timestep[None], prompt, return_dict=False)
    finally:
        hook.remove()


def test_branches_without_a_name_are_told_by_their_order() -> None:
    pipe = build()
    with torch.no_grad(), dit_accel.patch(pipe, Recipe(reuse=STAGE)):
        assert _by_hand(pipe, 9) == {step: 2 if step in GUIDED else 1 for step in COMPUTED}


def test_guidance_that_ends_within_a_run() -> None:
    pipe = build()
    with torch.no_grad(), dit_accel.patch(pipe, Recipe(reuse=STAGE)) as handle:
        assert _by_hand(pipe, 9, until=3) == {0: 2, 1: 1, 2: 2, 4: 1, 5: 1, 7: 1}
        assert not any("guided" in note for note in handle.summary().notes)


def test_forwards_of_other_latents_are_no_guidance() -> None:
    pipe = build()
    with torch.no_grad(), dit_accel.patch(pipe, Recipe(reuse=STAGE)):
        assert _by_hand(pipe, 9, drift=0.01) == dict.fromkeys(COMPUTED, 2)


def test_a_failed_first_branch_serves_nobody() -> None:
    """At step 1 the first branch fails and is tried again: that is a further forward, which takes nothing from it."""
    pipe = build()
    with torch.no_grad(), dit_accel.patch(pipe, Recipe(reuse=STAGE)):
        ran = _by_hand(pipe, 9, fails=(1, 0))
    assert ran[1] == 2


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_last_step_shares_too_and_frees_what_was_kept(guidance: float) -> None:
    stage = Listed((0, 1, 2, 3), 4, guided=(0,))
    pipe = build()
    with dit_accel.patch(pipe, Recipe(reuse=stage)) as handle:
        TINY["wan"].run(pipe, steps=4, guidance_scale=guidance)
        (session,) = handle.sessions.values()
        (trajectory,) = session._thread.runs._trajectories
        kept = [one for one in trajectory.run._reused.entries.values() if hasattr(one, "states")]
        assert len(kept) == (1 if guidance == 1.0 else 2)
        assert not any(one.states for one in kept)
        assert handle.summary().skipped_forwards == (0 if guidance == 1.0 else 3)


def test_two_transformers_of_one_run() -> None:
    """Each denoises a part of the steps, and its branches are parted from its own first step on."""
    tiny, pipe = TINY["wan2.2"], build("wan2.2")
    with dit_accel.patch(pipe, Recipe(reuse=Listed(tuple(range(8)), 8, guided=(0,)))) as handle:
        tiny.run(pipe, steps=8)
        summary = handle.summary()
    # Either begins with a step of both.
    assert (summary.computed_forwards, summary.skipped_forwards) == (8 + 2, 6)


def test_runs_in_threads_share_no_difference() -> None:
    tiny, recipe = TINY["wan"], replace(POOLED, reuse=STAGE)
    calls: list[dict[str, Any]] = [{"steps": 9}, {"steps": 9, "guidance_scale": 3.0}]
    alone = []
    for call in calls:
        fresh = build()
        dit_accel.patch(fresh, recipe)
        alone.append(tiny.run(fresh, **call))
    pipe, found = build(), {}
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


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (9, {0: 2, 1: 1, 2: 2, 4: 1, 5: 2, 7: 1}),
        (18, {0: 2, 2: 1, 3: 1, 5: 2, 8: 1, 10: 1, 12: 2, 15: 1}),
    ],
)
def test_lists_serve_runs_of_other_lengths(steps: int, expected: dict[int, int]) -> None:
    assert dict(_ran(build(), Recipe(reuse=STAGE), steps=steps)[0]) == expected


@pytest.mark.parametrize("steps", range(1, 60))
def test_a_run_of_any_length_guides_at_the_points_of_the_list(steps: int) -> None:
    stage = Listed(tuple(range(0, 30, 2)), 30, guided=tuple(range(0, 30, 6)))
    at = [StepContext(index, steps) for index in range(steps)]
    computed = [step.index for step in at if stage.computes(step)]
    guided = [step.index for step in at if stage.guides(step)]
    assert set(guided) <= set(computed)
    assert guided[0] == computed[0] == 0
    # Each on a computed step that is no farther behind than one lies behind another.
    farthest = max((after - before for before, after in pairwise(computed)), default=0)
    for one in stage.guided:
        place = one * (steps - 1) / 29
        assert any(place - 1 <= step <= place + farthest + 1 for step in guided)
    assert len(guided) <= len(stage.guided)


@pytest.mark.parametrize(("listed", "steps"), [(26, 8), (42, 8), (26, 15), (51, 29), (8, 26), (12, 15)])
def test_the_last_step_of_a_list_is_the_last_of_a_run(listed: int, steps: int) -> None:
    """Numbers of steps whose quotient is rounded: 25 times 7 / 25 is more than 7."""
    computed = (*range(listed - 1), 59)
    stage = Listed(computed, 60, guided=(0, 59))
    guided = [step for step in range(steps) if stage.guides(StepContext(step, steps))]
    assert guided == [0, stage.of_run(steps)[-1]]


@pytest.mark.parametrize("guided", [(3,), (2, 0), (0, 0), (-1,)])
def test_guided_steps_are_of_the_computed_ones(guided: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"reuse\.guided must list steps of reuse\.computed"):
        Listed((0, 1, 2), 7, guided=guided)
