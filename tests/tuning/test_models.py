"""What is predicted of combinations, against numbers that were made up."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dit_accel import Recipe, presets
from dit_accel.stages.reuse.listed import Listed
from dit_accel.tuning.candidates import Choice, Space, refuse_base
from dit_accel.tuning.error_model import Curve, ErrorModel, Held
from dit_accel.tuning.ladder import Ladder, Point, front
from dit_accel.tuning.lists import Trajectory, best_lists
from dit_accel.tuning.target import Target, error_of, fidelity_of
from dit_accel.tuning.time_model import RunSeconds, TimeModel, kinds_of


def smooth(count: int = 9, size: int = 40, noise: bool = True) -> tuple[np.ndarray, Trajectory]:
    """Velocities of a bent path, over noise levels that are not even, and its trajectory as a run shows it."""
    sigmas = [float(one) for one in np.linspace(1.0, 0.0, count + 1) ** 1.3]
    rates = np.random.default_rng(0).uniform(0.5, 3.0, size)
    velocities = np.stack([np.cos(rates * sigma * 2.0) for sigma in sigmas[:-1]])
    steps = velocities * np.abs(np.diff(sigmas))[:, None]
    positions = np.cumsum(np.concatenate([np.ones((1, size)), steps]), axis=0)
    latents = [torch.from_numpy(one).float() for one in positions]
    return velocities, Trajectory.of_latents(latents if noise else latents[1:], sigmas, count)


def by_hand(velocities: np.ndarray, computed: tuple[int, ...]) -> float:
    """Squared error of a list's continuations, the steps of a gap as one vector, of velocities of mean square one."""
    count = len(velocities)
    velocities = velocities / np.sqrt(np.mean(np.sum(velocities**2, axis=1)))
    total, gap = 0.0, np.zeros(velocities.shape[1])
    for step in range(count):
        done = [one for one in computed if one <= step]
        if step in computed:
            total, gap = total + float(gap @ gap), np.zeros_like(gap)
            continue
        last = done[-1]
        expected = velocities[last].copy()
        if len(done) > 1:
            expected += (velocities[last] - velocities[done[-2]]) * (step - last) / (last - done[-2])
        gap = gap + expected - velocities[step]
    return total + float(gap @ gap)


@pytest.mark.parametrize("computed", [(0, 3, 8), (0, 1, 4, 8), (0, 1, 2, 5, 6), (0,), tuple(range(9))])
def test_a_list_is_scored_by_what_its_continuations_miss(computed):
    velocities, trajectory = smooth()
    assert trajectory.score(computed) == pytest.approx(by_hand(velocities, computed), rel=1e-4, abs=1e-9)


def test_where_a_run_hides_its_noise_the_first_velocity_goes_on_in_a_straight_line():
    velocities, trajectory = smooth(noise=False)
    velocities[0] = 2.0 * velocities[1] - velocities[2]
    for computed in ((0, 1, 5, 8), (0, 3, 8)):
        assert trajectory.score(computed) == pytest.approx(by_hand(velocities, computed), rel=1e-4)


@pytest.mark.parametrize("required", [(), (4,), (2, 6)])
def test_no_list_of_as_many_steps_has_a_lower_score(required):
    _, trajectory = smooth()
    found = best_lists(trajectory, required)
    must = {0, 1, 8, *required}
    assert sorted(found) == list(range(len(must), 10))
    free = sorted(set(range(9)) - must)
    for count, steps in found.items():
        assert len(steps) == count
        assert must <= set(steps)
        others = itertools.combinations(free, count - len(must))
        lowest = min(trajectory.score(tuple(sorted({*must, *one}))) for one in others)
        assert trajectory.score(steps) == pytest.approx(lowest, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_short_runs_have_lists_too(num_steps):
    found = best_lists(Trajectory.usual(num_steps))
    assert all(steps[0] == 0 and steps[-1] == num_steps - 1 for steps in found.values())
    assert len(found) == max(0, num_steps - max(2, min(3, num_steps)) + 1)
    space = Space(presets.mass(), Trajectory.usual(num_steps))
    assert all(space.recipe(choice) for choice in space.all())


def test_errors_of_both_add_up():
    """Made up: a list's error goes with its score to the 1.5, that of sparsity falls with density and dense steps."""
    scores = {12: 0.02, 8: 0.1, 18: 0.004}
    of_list = {score: (3.0 * score**1.5, 5.0 * score**1.5) for score in scores.values()}
    of_density = {0.15: (4e-4, 9e-4), 0.3: (2e-4, 3e-4), 0.5: (5e-5, 6e-5)}
    usual = Choice(0.3, 3)
    lists = {count: Choice(computed=tuple(range(count))) for count in scores}
    measured = {lists[count]: of_list[score] for count, score in scores.items()}
    measured |= {Choice(density, 3): errors for density, errors in of_density.items()}
    measured |= {Choice(0.3, 1): (4e-4, 6e-4), Choice(0.3, 6): (1e-4, 1.5e-4)}
    model = ErrorModel.fit(measured, {lists[count]: score for count, score in scores.items()}, usual)
    for count, score in scores.items():
        both = Choice(0.5, 6, lists[count].computed)
        expected = np.add(of_list[score], np.multiply(of_density[0.5], 0.5))
        assert model.errors(both, score) == pytest.approx(expected, rel=1e-9)
    # Between the measurements a straight line in logarithms, below them in proportion to the score.
    assert model.errors(Choice(computed=(0, 1)), 0.05) == pytest.approx([3.0 * 0.05**1.5, 5.0 * 0.05**1.5], rel=1e-9)
    assert model.errors(Choice(computed=(0, 1)), 0.001) == pytest.approx(np.divide(of_list[0.004], 4), rel=1e-9)
    middle = np.sqrt(np.multiply(of_density[0.3], of_density[0.5]))
    assert model.errors(Choice(0.4, 3), 0.0) == pytest.approx(middle, rel=1e-9)
    assert model.errors(Choice(), 0.0) == pytest.approx([0.0, 0.0])


def test_noise_does_not_turn_a_curve_around():
    curve = Curve.through({0.1: (2e-3,), 0.2: (1e-3,), 0.4: (8e-3,)})
    assert [float(curve(at)[0]) for at in (0.1, 0.2, 0.4)] == pytest.approx([2e-3, 2e-3, 8e-3])
    held = Held.through({0.2: (1e-3,), 0.3: (2e-3,), 0.5: (1e-4,)})
    assert [float(held(at)[0]) for at in (0.1, 0.3, 0.5, 0.9)] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])


def test_kinds_of_steps():
    mass = presets.mass(dense_fraction=0.3)
    assert kinds_of(mass, 10) == ("dense",) * 2 + ("search",) + ("sparse",) * 7
    listed = mass.with_fields({"reuse": "listed", "reuse.computed": (0, 1, 5, 9), "reuse.num_steps": 10})
    skipped = ("skipped",) * 3
    # The search is always computed.
    assert kinds_of(listed, 10) == ("dense", "dense", "search", *skipped[:2], "sparse", *skipped, "sparse")
    assert kinds_of(Recipe(reuse=Listed((0, 2), 4)), 4) == ("dense", "skipped", "dense", "skipped")


def test_seconds_of_a_run_are_those_of_its_steps():
    """Made up: a step takes 10 s dense, 12 searching, 2 + 6 density sparse, 1 skipped; text and decoding 7."""
    cost = {"dense": 10.0, "search": 12.0, "skipped": 1.0}

    def run(recipe: Recipe, slow: float = 1.0) -> tuple[Recipe, RunSeconds]:
        kinds = kinds_of(recipe, 10)
        steps = [cost.get(kind) or 2.0 + 6.0 * recipe.select.density for kind in kinds]
        return recipe, RunSeconds((steps[0] * slow, *steps[1:]), 7.0)

    lists = Recipe(reuse=Listed((0, 1, 5, 9), 10, order=1))
    parts = [run(Recipe(), slow=3.0), run(lists), run(presets.mass(0.2)), run(presets.mass(0.6))]
    model = TimeModel.fit(parts)
    both = presets.mass(0.4, dense_fraction=0.1).with_fields(
        {"reuse": "listed", "reuse.computed": (0, 1, 5, 9), "reuse.num_steps": 10}
    )
    assert model.seconds(both, 10) == pytest.approx(7.0 + 12.0 + 3 * (2.0 + 6.0 * 0.4) + 6 * 1.0)
    assert model.seconds(Recipe(), 10) == pytest.approx(107.0)


def point(density: float, decibels: float, seconds: float) -> Point:
    return Point(Choice(density, 1, (0, 1)), np.asarray([error_of("psnr", decibels)]), seconds)


def test_the_ladder_runs_the_fastest_that_promises_the_target_and_learns():
    predicted = [point(0.1, 33.0, 2.0), point(0.2, 36.0, 3.0), point(0.3, 38.0, 4.0), point(0.4, 41.0, 6.0)]
    target = Target("psnr", 35.0)
    ladder = Ladder(target, 10.0, predicted, {})
    assert ladder.next() == predicted[1].choice
    # It came out 2 dB worse and half as slow again: the next one is expected at 36 dB and 6 s, and is.
    runs = {predicted[1].choice: point(0.2, 34.0, 4.5)}
    assert ladder.best() is None
    ladder = Ladder(target, 10.0, predicted, runs)
    assert ladder.next() == predicted[2].choice
    assert ladder.fidelity(ladder.expected()[2]) == pytest.approx(36.0)
    assert ladder.expected()[2].seconds == pytest.approx(6.0)
    runs = runs | {predicted[2].choice: point(0.3, 36.0, 6.0)}
    ladder = Ladder(target, 10.0, predicted, runs)
    assert ladder.best() is runs[predicted[2].choice]
    assert ladder.next() is None  # what is left is slower, or loses more


def test_a_time_is_met_with_the_least_error():
    predicted = [point(0.1, 33.0, 2.0), point(0.2, 36.0, 3.0), point(0.3, 38.0, 4.0), point(0.4, 41.0, 6.0)]
    ladder = Ladder(Target("speedup", 2.5), 10.0, predicted, {})
    assert ladder.next() == predicted[2].choice
    runs = {predicted[2].choice: point(0.3, 38.0, 4.1)}
    ladder = Ladder(Target("speedup", 2.5), 10.0, predicted, runs)
    assert ladder.best() is None
    assert ladder.next() == predicted[1].choice


def test_where_nothing_is_expected_to_meet_it_the_nearest_is_run_once():
    predicted = [point(0.2, 36.0, 3.0), point(0.4, 41.0, 6.0), point(0.5, 50.0, 11.0)]
    runs = {Choice(0.3, 1): Point(Choice(0.3, 1), np.asarray([error_of("psnr", 38.0)]), 5.0)}
    ladder = Ladder(Target("psnr", 45.0), 10.0, predicted, runs)
    assert ladder.next() == predicted[1].choice  # the other one is slower than dense
    runs[predicted[1].choice] = point(0.4, 41.5, 6.0)
    ladder = Ladder(Target("psnr", 45.0), 10.0, predicted, runs)
    assert ladder.next() is None
    assert ladder.best() is None
    assert ladder.nearest() is runs[predicted[1].choice]


def test_the_front_is_what_nothing_beats():
    points = [point(0.1, 30.0, 2.0), point(0.2, 29.0, 3.0), point(0.3, 38.0, 4.0), point(0.4, 38.0, 6.0)]
    assert front(points[::-1]) == [points[0], points[2]]


@pytest.mark.parametrize("name", ["psnr", "ssim", "lpips"])
def test_a_mean_is_of_values_not_of_errors(name):
    values = {"psnr": [30.0, 41.0], "ssim": [0.9, 0.99], "lpips": [0.02, 0.3]}[name]
    assert fidelity_of(name, [error_of(name, one) for one in values]) == pytest.approx(np.mean(values))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("psnr", r"NAME=VALUE, such as psnr=35 or speedup=2.5, got 'psnr'\."),
        ("psnr=high", "NAME=VALUE"),
        ("vmaf=90", "must name one of psnr, ssim, lpips, speedup, got 'vmaf'"),
        ("psnr=-3", "psnr must be finite and above 0, got -3"),
        ("psnr=nan", "psnr must be finite and above 0, got nan"),
        ("ssim=1.5", "between 0 and 1, got 1.5"),
        ("speedup=1", "speedup must be finite and above 1, got 1"),
        ("lpips=inf", "lpips must be finite and above 0, got inf"),
    ],
)
def test_a_target_that_cannot_be(text, words):
    with pytest.raises(ValueError, match=words) as caught:
        Target.read(text)
    assert "\n" not in str(caught.value)


def test_targets_read_as_they_are_written():
    assert Target.read("psnr=35") == Target("psnr", 35.0)
    assert str(Target.read("speedup=2.50")) == "speedup=2.5"
    assert Target("lpips", 0.05).is_met(0.04, 1.2)
    assert not Target("lpips", 0.05).is_met(0.06, 1.2)
    assert not Target("psnr", 35.0).is_met(40.0, 0.9)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (presets.dense(), "a density to choose, got DenseSelect"),
        (presets.sage(), "a density to choose, got FullSelect"),
        (presets.mass().with_fields({"reuse": "first_block"}), "the steps to compute, and this recipe has FirstBlock"),
        (presets.pooled().with_fields({"select.head_densities": ((0.2, 0.4),)}), "one density"),
    ],
)
def test_recipes_that_leave_nothing_to_choose(recipe, words):
    with pytest.raises(ValueError, match=words):
        refuse_base(recipe)


def test_a_choice_is_found_again_in_its_recipe():
    for choice in (Choice(), Choice(0.3, 2), Choice(computed=(0, 1, 5)), Choice(0.15, 1, (0, 1, 3, 6))):
        assert Choice.of(choice.recipe(presets.mass(), 7), 7) == choice
