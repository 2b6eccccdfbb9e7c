"""What a list puts in the place of skipped steps, against the sums written out in exact fractions."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import pairwise

import pytest

from dit_accel import Recipe
from dit_accel.layout import StepContext
from dit_accel.stages.reuse.continuation import STRONGEST, Continuation
from dit_accel.stages.reuse.listed import Listed

STEPS = 12
COMPUTED = (0, 1, 4, 9, 11)
VALUES = [Fraction(3, 7), Fraction(-2), Fraction(11, 3), Fraction(5), Fraction(-1, 9)]
# Step 10 goes less far than what is due there asks for.
LENGTHS = [Fraction(step * step + 5, 90) for step in range(10)] + [Fraction(1, 9), Fraction(1)]


def line(computed: list[int], values: list[Fraction], step: int, slope: Fraction) -> Fraction:
    """A value at a step by the last two computed ones."""
    if len(computed) < 2:
        return values[-1]
    rise = (values[-1] - values[-2]) / (computed[-1] - computed[-2])
    return values[-1] + slope * rise * (step - computed[-1])


def expected(step: int, slope: Fraction, correction: Fraction) -> Fraction:
    """The line, and the last gap's debt: between its two computed steps the value is taken to go straight."""
    known = [one for one in COMPUTED if one < step]
    values = VALUES[: len(known)]
    value = line(known, values, step, slope)
    if len(known) < 2:
        return value
    before, last = known[-2:]
    debt = passed = Fraction(0)
    for one in range(before + 1, last):
        straight = values[-2] + (values[-1] - values[-2]) * Fraction(one - before, last - before)
        debt += LENGTHS[one] * (straight - line(known[:-1], values[:-1], one, slope))
        passed += LENGTHS[one]
    upcoming = min([one for one in COMPUTED if one > step], default=STEPS)
    ahead = max(sum(LENGTHS[last + 1 : upcoming], Fraction(0)), passed / Fraction(STRONGEST))
    return value + correction * debt / ahead


def found(step: int, continuation: Continuation) -> float:
    known = [one for one in COMPUTED if one < step]
    upcoming = min([one for one in COMPUTED if one > step], default=STEPS)
    shares = continuation.shares(known, step, upcoming, [float(one) for one in LENGTHS])
    values = [float(one) for one in VALUES[: len(known)]]
    differences = [now - then for then, now in pairwise(values)][::-1]
    return values[-1] + sum(share * one for share, one in zip(shares, differences, strict=False))


@pytest.mark.parametrize("step", [step for step in range(STEPS) if step not in COMPUTED])
@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("correction", [0.0, 0.75, 1.0])
def test_a_skipped_step_is_the_line_and_the_debt_of_the_last_gap(step: int, slope: float, correction: float) -> None:
    # All of a dozen operations round once, and no value passes 20.
    assert found(step, Continuation(slope, correction)) == pytest.approx(
        float(expected(step, Fraction(slope), Fraction(correction))), abs=12 * 20 * 2.0**-53, rel=0
    )


def test_a_full_correction_makes_the_integral_that_of_straight_lines() -> None:
    # Behind 4 come 5 to 8, which pay for 2 and 3.
    paid = sum(LENGTHS[one] * expected(one, Fraction(1, 2), Fraction(1)) for one in range(5, 9))
    without = sum(LENGTHS[one] * expected(one, Fraction(1, 2), Fraction(0)) for one in range(5, 9))
    straight = sum(LENGTHS[one] * (VALUES[1] + (VALUES[2] - VALUES[1]) * Fraction(one - 1, 3)) for one in (2, 3))
    taken = sum(LENGTHS[one] * expected(one, Fraction(1, 2), Fraction(0)) for one in (2, 3))
    assert paid - without == straight - taken


@pytest.mark.parametrize(("slope", "correction", "kept"), [(0, 0, 1), (1, 0, 2), (0, 1, 2), (0.5, 1, 3)])
def test_no_more_is_kept_than_is_read(slope: float, correction: float, kept: int) -> None:
    continuation = Continuation(slope, correction)
    assert continuation.kept == kept
    assert len(continuation.shares((0, 3, 5), 6, 9, [1.0] * 9)) <= kept - 1


def test_steps_that_go_nowhere_are_not_divided_by() -> None:
    assert Continuation(1.0, 1.0).shares((0, 2, 4), 5, 7, [0.0] * 7) == (0.5,)


def test_a_list_says_what_comes_next() -> None:
    listed = Listed((0, 2, 4, 7), 9, order=1, slope=0.5, correction=1.0)
    sigmas = tuple(1.0 - (step / 9) ** 2 for step in range(10))
    step = StepContext(5, 9, sigmas[5], sigmas=sigmas)
    lengths = [then - now for then, now in pairwise(sigmas)]
    assert listed.shares((0, 2, 4), step) == Continuation(0.5, 1.0).shares((0, 2, 4), 5, 7, lengths)
    # Without the last noise level nobody knows how far a step goes.
    unknown = StepContext(5, 9, sigmas[5], sigmas=sigmas[:-1])
    assert listed.shares((0, 2, 4), unknown) == Continuation(0.5, 1.0).shares((0, 2, 4), 5, 7, [1.0] * 9)


@pytest.mark.parametrize("name", ["slope", "correction"])
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_shares_lie_between_nothing_and_all(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^reuse\.{name} must lie in \[0, 1\], got {value}\.$"):
        Listed(**{name: value})  # type: ignore[arg-type]


def test_a_recipe_keeps_both() -> None:
    recipe = Recipe(reuse=Listed((0, 1, 4), 7, order=1, slope=0.5, correction=0.75))
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
