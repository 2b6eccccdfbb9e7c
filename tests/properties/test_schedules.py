"""Schedules over whole runs: how old a plan may be, where a run is dense, at which density."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.layout import StepContext
from dit_accel.stages.schedule import Schedule

shares = st.one_of(st.sampled_from((0.0, 0.2, 1.0)), st.floats(0.0, 1.0))
progress = st.floats(0.0, 1.0, exclude_max=True)
densities = st.floats(0.01, 1.0)
points = st.lists(st.tuples(progress, densities), max_size=4, unique_by=lambda point: point[0]).map(tuple)
layers = st.lists(st.integers(-4, 3), max_size=3).map(tuple)


@st.composite
def schedules(draw: st.DrawFn, **fixed: object) -> Schedule:
    refreshed = draw(st.booleans())
    fields = {
        "dense_fraction": draw(shares),
        "dense_layers": draw(layers),
        "refresh_every": draw(st.integers(1, 9)),
        "refresh_at": draw(st.lists(progress, max_size=4).map(tuple)),
        "dense_refresh": refreshed,
        "plan_in_dense_phase": refreshed and draw(st.booleans()),
        "density_points": draw(points),
        "density_over": draw(st.sampled_from(("progress", "sigma"))),
        "drift_bound": draw(st.sampled_from((None, 0.1))),
        "few_steps": draw(st.sampled_from((0, 8))),
    }
    return Schedule(**{**fields, **fixed})


@st.composite
def runs(draw: st.DrawFn, begin: int = 0) -> list[StepContext]:
    """The forwards of one run: its steps rise, each with one forward or two, and some may be skipped by a cache."""
    count, branches = draw(st.integers(1, 60)), draw(st.integers(1, 2))
    skipped = draw(st.sets(st.integers(0, 59)))
    forwards, found = begin, []
    for index in range(count):
        for branch in range(branches):
            if index not in skipped:
                sigma = 1 - index / count
                name = ("cond", "uncond")[branch]
                found.append(StepContext(index, count, sigma=sigma, branch=name, forward_id=forwards))
                forwards += 1
    return found


def plans(schedule: Schedule, run: list[StepContext]) -> list[tuple[StepContext, StepContext]]:
    """Every sparse forward of layer 1 of 4, and the one whose plan it uses, per branch as an engine keeps them."""
    made: dict[str | None, StepContext] = {}
    used = []
    for step in run:
        if schedule.dense_reason(step, 1, 4) is None:
            kept = made.get(step.branch)
            if kept is None or schedule.needs_plan(step, kept):
                made[step.branch] = step
            used.append((step, made[step.branch]))
    return used


@given(schedules(), runs())
def test_a_plan_is_never_older_than_allowed(schedule: Schedule, run: list[StepContext]):
    for step, made in plans(schedule, run):
        assert made.branch == step.branch
        assert made.forward_id <= step.forward_id
        if schedule.refresh_at:
            assert not any(made.progress < point <= step.progress for point in schedule.refresh_at)
        elif schedule.refresh_every > 1 or schedule.drift_bound is None:
            assert step.index - made.index < schedule.refresh_every


@given(schedules(), runs())
def test_no_plan_is_made_before_its_time(schedule: Schedule, run: list[StepContext]):
    last: dict[str | None, StepContext] = {}
    for step, made in plans(schedule, run):
        kept = last.get(step.branch)
        if made is step and kept is not None:
            if schedule.refresh_at:
                assert any(kept.progress < point <= step.progress for point in schedule.refresh_at)
            else:
                assert step.index - kept.index >= schedule.refresh_every
        last[step.branch] = made


@given(schedules(), runs())
def test_the_end_of_planning_is_foreseen(schedule: Schedule, run: list[StepContext]):
    used = plans(schedule, run)
    for number, (step, _) in enumerate(used):
        if not schedule.plans_after(step):
            later = [s for s, made in used[number + 1 :] if made is s and s.branch == step.branch]
            assert not later


@given(schedules(), runs())
def test_the_dense_phase_is_a_prefix(schedule: Schedule, run: list[StepContext]):
    reasons = [schedule.dense_reason(step, 1, 4) for step in run]
    if reasons and reasons[0] == "dense layer":
        assert set(reasons) == {"dense layer"}
        return
    dense = [reason is not None for reason in reasons]
    assert dense == sorted(dense, reverse=True)
    count = run[0].num_steps if run else 0
    share, early = schedule.dense_fraction, int(schedule.plan_in_dense_phase)
    if count <= schedule.few_steps:
        assert not any(dense)
        return
    for step, is_dense in zip(run, dense, strict=True):
        assert is_dense == ((step.index + early) / count < share)
    if run and run[0].index == 0 and share > 0 and not early:
        assert dense[0], "any dense phase holds the first step"


@given(schedules(), st.integers(1, 6), st.integers(0, 5))
def test_dense_layers_count_from_both_ends(schedule: Schedule, count: int, layer: int):
    layer = min(layer, count - 1)
    named = layer in schedule.dense_layers or layer - count in schedule.dense_layers
    # Without a pipeline there is no phase.
    assert (schedule.dense_reason(StepContext(), layer, count) is not None) == named


@given(schedules(), runs())
def test_a_density_is_between_those_around_it(schedule: Schedule, run: list[StepContext]):
    around = sorted(schedule.density_points)
    for step in run:
        position = step.sigma if schedule.density_over == "sigma" else step.progress
        density = schedule.density(step)
        if not around:
            assert density is None
            continue
        below = [share for place, share in around if place <= position][-1:] or [around[0][1]]
        above = [share for place, share in around if place >= position][:1] or [around[-1][1]]
        low, high = sorted((*below, *above))
        assert low * (1 - 1e-12) <= density <= high * (1 + 1e-12)
        assert 0.0 < density <= 1.0
        for place, share in around:
            if place == position:
                assert density == pytest.approx(share)
    assert schedule.density(StepContext()) is None, "a bare forward has no place in a trajectory"


@given(schedules(), runs(), st.data())
def test_an_earlier_step_begins_a_new_run(schedule: Schedule, run: list[StepContext], data: st.DataObject):
    second = data.draw(runs(begin=len(run)))
    for made, step in zip(run, second, strict=False):
        if step.index <= made.index:
            assert schedule.needs_plan(step, made)
        assert not made.index or not schedule.needs_plan(made, made), "a checkpointed forward repeats its own plan"


@given(schedules(drift_bound=None), st.integers(0, 100), st.integers(0, 20))
def test_without_a_pipeline_plans_age_by_forwards(schedule: Schedule, first: int, age: int):
    made, step = StepContext(forward_id=first), StepContext(forward_id=first + age)
    assert schedule.needs_plan(step, made) == (age >= schedule.refresh_every)
