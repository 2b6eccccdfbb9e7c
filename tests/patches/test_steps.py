"""What each step of a run did: it adds up to the summary; recording changes no result, and is free while it is off."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import replace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import dit_accel
from dit_accel import step_log
from dit_accel.patches.step_summary import StepSummary
from dit_accel.patches.steps_svg import plan_over_steps
from dit_accel.stages.reuse.listed import Listed
from dit_accel.stages.schedule import Schedule
from tests.peaked import RECIPES
from tests.tiny import TINY

STEPS = 6


def run(pipe: Any, steps: int = STEPS, **changes: Any) -> torch.Tensor:
    return TINY["wan"].run(pipe, steps=steps, **changes)


def a_step(**changes: Any) -> StepSummary:
    plain = StepSummary("", 1, 0, 4, 1.0, 2, 0, 4, {}, 0, 4, 0.25)
    return replace(plain, **changes)


@pytest.mark.parametrize(("recipe", "skipped"), [("mass", [0, 0, 0, 2, 0, 2]), ("pooled", [0, 0, 0, 0, 0, 2])])
def test_steps_add_up_to_the_summary(recipe: str, skipped: list[int]) -> None:
    """Two branches in two layers at each step. The list leaves out steps 3 and 5; at step 3 a plan of "pooled" is due,
    which runs all layers."""
    pipe = TINY["wan"].build()
    asked = replace(RECIPES[recipe], reuse=Listed((0, 1, 2, 4), STEPS))
    with dit_accel.patch(pipe, asked) as handle:
        wanted = run(pipe)
        handle.reset()
        handle.record_steps()
        assert run(pipe).equal(wanted)
        summary = handle.summary()
    steps = summary.steps
    assert [step.step for step in steps] == list(range(STEPS))
    assert {(step.transformer, step.run, step.of_steps) for step in steps} == {("", 1, STEPS)}
    assert [step.sigma for step in steps] == pytest.approx(pipe.scheduler.sigmas[:STEPS].tolist())
    assert [step.forwards for step in steps] == [2] * STEPS
    assert [step.skipped_forwards for step in steps] == skipped
    assert sum(step.sparse_calls for step in steps) == summary.sparse_calls > 0
    dense: Counter[str] = Counter()
    for step in steps:
        dense.update(step.dense_calls)
        calls = step.sparse_calls + sum(step.dense_calls.values())
        assert calls == (0 if step.skipped_forwards else 4)
        assert step.plans_made + step.plans_reused <= 4
    assert dense == summary.dense_calls
    assert sum(step.plans_made for step in steps) == sum(layer.plans_made for layer in summary.layers) > 0
    total = sum((step.density or 0.0) * step.sparse_calls for step in steps)
    assert total / summary.sparse_calls == pytest.approx(summary.density)
    assert all(step.seconds is None for step in steps)
    assert "steps: 6 recorded" in str(summary)
    assert json.loads(json.dumps(summary.to_dict()))["steps"][5]["skipped_forwards"] == 2


def test_kinds_of_steps_follow_the_schedule() -> None:
    """A third of the steps dense, then a plan each second step."""
    schedule = Schedule(dense_fraction=1 / 3, refresh_every=2)
    recipe = replace(RECIPES["pooled"], schedule=schedule)
    pipe = TINY["wan"].build()
    with dit_accel.patch(pipe, recipe) as handle:
        handle.record_steps()
        run(pipe)
        steps = handle.summary().steps
    assert [step.kind for step in steps] == ["dense", "dense", "planned", "reused", "planned", "reused"]
    assert [step.plans_made for step in steps] == [0, 0, 4, 0, 4, 0]
    assert [step.plans_reused for step in steps] == [0, 0, 0, 4, 0, 4]
    assert [step.mean_density == 1 for step in steps] == [True, True, False, False, False, False]
    assert str(steps[0]) == "step 1 of 6, dense, 4 dense (dense phase)"
    assert str(steps[2]).startswith("step 3 of 6, planned, 4 sparse calls at density 0.")


def test_a_search_step_plans_and_stays_dense() -> None:
    pipe = TINY["wan"].build()
    with dit_accel.patch(pipe, RECIPES["mass"]) as handle:
        handle.record_steps()
        run(pipe)
        steps = handle.summary().steps
    searches = [step for step in steps if "search step" in step.dense_calls]
    assert searches
    assert all(step.plans_made == 4 and step.kind == "planned" and not step.sparse_calls for step in searches)


def test_runs_and_transformers_are_told_apart() -> None:
    pipe = TINY["wan"].build(two=True)
    with dit_accel.patch(pipe, "pooled", density=0.5) as handle:
        handle.record_steps()
        run(pipe)
        run(pipe, 4)
        steps = handle.summary().steps
    places = {(step.transformer, step.run): [] for step in steps}
    for step in steps:
        places[step.transformer, step.run].append(step.step)
    assert set(places) == {(name, number) for name in ("transformer", "transformer_2") for number in (1, 2)}
    for number, count in ((1, STEPS), (2, 4)):
        both = places["transformer", number] + places["transformer_2", number]
        assert sorted(both) == list(range(count))


def test_two_threads_record_two_runs() -> None:
    pipes = [TINY["wan"].build()]
    pipes.append(type(pipes[0]).from_pipe(pipes[0]))
    pipes[1].scheduler = type(pipes[0].scheduler).from_config(pipes[0].scheduler.config)
    with dit_accel.patch(pipes[0], "pooled", density=0.5) as handle:
        handle.record_steps(seconds=True)
        threads = [threading.Thread(target=run, args=(pipe, 5)) for pipe in pipes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        summary = handle.summary()
    assert Counter(step.run for step in summary.steps) == {1: 5, 2: 5}
    assert all(step.forwards == 2 for step in summary.steps)
    assert sum(step.plans_made for step in summary.steps) == sum(layer.plans_made for layer in summary.layers)


def test_seconds_hold_what_the_summary_measures() -> None:
    pipe = TINY["wan"].build()
    with dit_accel.patch(pipe, "mass", density=0.5) as handle:
        handle.record_steps(seconds=True)
        run(pipe)
        summary = handle.summary()
    inner = summary.sparse_seconds + summary.dense_seconds + summary.plan_seconds
    attention = sum(step.attention_seconds or 0.0 for step in summary.steps)
    whole = sum(step.seconds or 0.0 for step in summary.steps)
    assert 0 < inner <= attention <= whole
    assert str(summary.steps[0]).endswith(" s")


def test_a_bare_forward_is_a_step_by_itself() -> None:
    model = TINY["wan"].build().transformer
    with torch.no_grad(), dit_accel.patch(model, "pooled", density=0.5) as handle:
        handle.record_steps()
        for _ in range(3):
            model(torch.randn(1, 16, 3, 12, 14), torch.tensor([1.0]), torch.randn(1, 4, 32))
        steps = handle.summary().steps
    assert [(step.step, step.forwards, step.sparse_calls) for step in steps] == [(None, 1, 2)] * 3
    assert str(steps[0]).startswith("a forward, planned")


def test_a_repetition_for_gradients_is_no_step() -> None:
    model = TINY["wan"].build().transformer
    model.enable_gradient_checkpointing()
    model.train()
    with dit_accel.patch(model, "pooled", density=0.5) as handle:
        handle.record_steps(seconds=True)
        model(torch.randn(1, 16, 3, 12, 14), torch.tensor([1.0]), torch.randn(1, 4, 32))[0].sum().backward()
        (step,) = handle.summary().steps
    assert (step.forwards, step.sparse_calls, step.plans_made) == (1, 2, 2)


def test_a_forward_that_fails_is_not_counted() -> None:
    pipe = TINY["wan"].build()
    with dit_accel.patch(pipe, "pooled", density=0.5) as handle:
        handle.record_steps(seconds=True)
        failing = pipe.transformer.proj_out.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(pipe)
        failing.remove()
        (broken,) = handle.summary().steps
        assert (broken.forwards, broken.seconds, sum(broken.dense_calls.values())) == (0, 0.0, 2)
        run(pipe)
        assert [step.forwards for step in handle.summary().steps if step.run == 2] == [2] * STEPS


def test_nothing_is_recorded_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is off costs a look at an attribute: nothing of the log is ever called."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("recorded")

    pipe = TINY["wan"].build()
    with dit_accel.patch(pipe, "mass") as handle:
        with monkeypatch.context() as patched:
            for name in ("start", "end_forward", "end_attention", "add_plans", "add_sparse", "add_dense"):
                patched.setattr(step_log.StepLog, name, refuse)
            run(pipe)
            assert handle.summary().steps == ()
            assert "steps:" not in str(handle.summary())
            handle.record_steps()
            with pytest.raises(AssertionError, match="recorded"):
                run(pipe)
            handle.record_steps(False)
            run(pipe)
            handle.record_steps()
            with handle.disabled():
                run(pipe)
        assert handle.summary().steps == ()
        run(pipe)
        assert len(handle.summary().steps) == STEPS
        handle.reset()
        assert handle.summary().steps == ()
        run(pipe)
        assert {step.run for step in handle.summary().steps} == {1}


def test_a_server_that_records_keeps_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_log, "KEPT_STEPS", 4)
    pipe = TINY["wan"].build()
    with dit_accel.patch(pipe, "pooled") as handle:
        handle.record_steps()
        run(pipe)
        assert [step.step for step in handle.summary().steps] == [2, 3, 4, 5]


def _bars(svg: str) -> list[tuple[str, float]]:
    """Kind and height of each bar."""
    found = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}rect")
    bars = [one for one in found if "class" in one.attrib]
    return [(one.attrib["class"], float(one.attrib["height"])) for one in bars]


def test_bars_are_as_high_as_the_share_that_ran() -> None:
    steps = [
        a_step(sparse_calls=0, dense_calls={"dense <phase>": 4}, density=None, plans_reused=0),
        a_step(step=1, plans_made=4, density=0.5),
        a_step(step=2),
        a_step(step=3, skipped_forwards=2, sparse_calls=0, density=None),
    ]
    bars = _bars(plan_over_steps(steps))
    assert [kind for kind, _ in bars] == ["dense", "planned", "reused", "skipped"]
    heights = [height for _, height in bars]
    assert heights[1] / heights[0] == pytest.approx(0.5, abs=0.01)
    assert heights[2] / heights[0] == pytest.approx(0.25, abs=0.01)
    assert heights[3] == 2.0, "a mark"
    for many in (1, 50, 300):
        assert len(_bars(plan_over_steps([a_step(step=number) for number in range(many)]))) == many


def test_what_no_picture_can_show_is_refused() -> None:
    with pytest.raises(ValueError, match="No steps were recorded"):
        plan_over_steps([])
    with pytest.raises(ValueError, match="got 2 of them"):
        plan_over_steps([a_step(), a_step(run=2)])


def test_a_notebook_shows_the_latest_run() -> None:
    pipe = TINY["wan"].build()
    with dit_accel.patch(pipe, "pooled", density=0.5) as handle:
        assert "<svg" not in handle.summary()._repr_html_()
        handle.record_steps()
        run(pipe)
        run(pipe, 4)
        shown = handle.summary()._repr_html_()
    assert shown.count("<svg") == 1
    assert len(_bars(shown[shown.index("<svg") : shown.index("</svg>") + 6])) == 4
