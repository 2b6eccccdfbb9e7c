import pytest

from dit_accel.layout import StepContext
from dit_accel.stages.schedule import Schedule


def _run(schedule: Schedule, steps: int) -> list[int]:
    """Steps at which a run makes a plan."""
    made, at = None, []
    for index in range(steps):
        step = StepContext(index=index, num_steps=steps, forward_id=index)
        if schedule.dense_reason(step, 0, 4) is None and (made is None or schedule.needs_plan(step, made)):
            made = step
            at.append(index)
    return at


def test_dense_phase_and_refresh():
    assert _run(Schedule(), 4) == [0, 1, 2, 3]
    assert _run(Schedule(dense_fraction=0.25, refresh_every=3), 12) == [3, 6, 9]
    assert _run(Schedule(dense_fraction=0.2), 5) == [1, 2, 3, 4]
    assert _run(Schedule(dense_fraction=0.01), 5) == [1, 2, 3, 4], "any dense phase holds the first step"
    assert _run(Schedule(dense_fraction=1.0), 5) == []
    assert _run(Schedule(dense_fraction=0.2, refresh_at=(0.5, 0.55, 0.9)), 10) == [2, 5, 6, 9]


def test_the_first_plan_may_be_made_in_the_last_dense_step():
    kind = {"dense_refresh": True, "plan_in_dense_phase": True}
    for share, steps, first in ((0.2, 30, 5), (0.2, 10, 1), (0.2, 4, 0), (0.0, 4, 0), (1.0, 4, 3), (0.25, 50, 12)):
        assert _run(Schedule(dense_fraction=share, refresh_at=(0.0,), **kind), steps) == [first]
    with pytest.raises(ValueError, match="plan_in_dense_phase needs"):
        Schedule(plan_in_dense_phase=True)


def test_of_few_steps_none_is_dense():
    schedule = Schedule(dense_fraction=0.9, dense_refresh=True, few_steps=8)
    for count, dense in ((1, 0), (8, 0), (9, 9), (10, 9)):
        steps = [StepContext(index=index, num_steps=count) for index in range(count)]
        assert sum(schedule.dense_reason(step, 0, 4) == "dense phase" for step in steps) == dense
        assert all(schedule.searches_densely(step) == (count > 8) for step in steps)
    assert not schedule.searches_densely(StepContext()), "a bare transformer would search each time"
    assert schedule.dense_reason(StepContext(0, 4, guided=True), 0, 4) == "dense phase", (
        "no distilled model has guidance"
    )
    named = Schedule(dense_layers=(1,), few_steps=8)
    assert named.dense_reason(StepContext(index=0, num_steps=4), 1, 4) == "dense layer"


def test_whether_a_run_plans_again():
    steps = [StepContext(index=index, num_steps=10) for index in range(10)]
    schedule = Schedule(refresh_at=(0.2, 0.6))
    assert [schedule.plans_after(step) for step in steps] == [True] * 6 + [False] * 4
    assert Schedule(refresh_every=100).plans_after(steps[9]), "its age is not known ahead"
    assert schedule.plans_after(StepContext()), "nor the end of forwards without a run"


def test_dense_layers_count_from_both_ends():
    step = StepContext()
    schedule = Schedule(dense_layers=(0, -1))
    assert [schedule.dense_reason(step, layer, 4) for layer in range(4)] == [
        "dense layer",
        None,
        None,
        "dense layer",
    ]


def test_a_new_run_makes_a_new_plan():
    schedule = Schedule(refresh_every=100)
    made = StepContext(index=5, num_steps=10, forward_id=7)
    assert not schedule.needs_plan(StepContext(index=6, num_steps=10, forward_id=8), made)
    assert schedule.needs_plan(StepContext(index=2, num_steps=10, forward_id=20), made)
    assert schedule.needs_plan(StepContext(index=5, num_steps=10, forward_id=20), made)
    assert not schedule.needs_plan(made, made), "a checkpointed forward is repeated with its own plan"


def test_without_a_pipeline_plans_age_by_forwards():
    schedule = Schedule(dense_fraction=0.5, refresh_every=2)
    assert schedule.dense_reason(StepContext(), 0, 4) is None
    made = StepContext(forward_id=3)
    assert not schedule.needs_plan(StepContext(forward_id=4), made)
    assert schedule.needs_plan(StepContext(forward_id=5), made)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_fraction": 1.5}, r"dense_fraction must lie in \[0, 1\], got 1.5"),
        ({"refresh_every": 0}, "refresh_every must be at least 1 step, got 0"),
        ({"few_steps": -1}, "few_steps must be at least 0 steps, got -1"),
        ({"refresh_at": (1.0,)}, "refresh_at must hold progress values"),
    ],
)
def test_impossible_schedules(changes, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**changes)
