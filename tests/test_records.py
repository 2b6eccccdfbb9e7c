"""Sums of what lies on devices."""

import math

import pytest
import torch

from dit_accel.records import KEPT_PARTS, LayerRecord, Tally


@pytest.mark.parametrize("count", [0, 1, 7, KEPT_PARTS - 1, KEPT_PARTS, 3 * KEPT_PARTS + 5])
def test_a_tally_is_the_sum_of_its_parts(count):
    parts = torch.rand(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    tally = Tally(torch.sum)
    for part in parts.float():
        tally.add(part)
    assert tally.total() == pytest.approx(float(parts.sum()), rel=1e-6)
    assert tally.total() == tally.total()  # asking changes nothing


def test_parts_count_that_come_after_somebody_asked():
    tally = Tally(torch.sum)
    for number in range(1, 4):
        tally.add(torch.tensor(float(number)))
        assert tally.total() == sum(range(number + 1))


def test_a_tally_keeps_no_more_than_it_says():
    tally = Tally(torch.sum)
    for _ in range(2 * KEPT_PARTS + 1):
        tally.add(torch.tensor(1.0))
    assert len(tally._parts) < KEPT_PARTS


def test_calls_with_a_nan_are_counted_and_infinities_are_none():
    record = LayerRecord("layer")
    for number in (1.0, math.nan, math.inf, -math.inf, math.nan, 0.0):
        record.largest.add(torch.tensor([0.5, number, -1.0]).amax())
    assert record.nan_calls == 2
    record.reset()
    assert record.nan_calls == 0
    assert record.density_sum == 0.0


def test_densities_of_a_record_outlive_nothing_but_reset():
    record = LayerRecord("layer")
    record.densities.add(torch.tensor(0.25))
    record.densities.add(torch.tensor(0.5))
    assert record.density_sum == 0.75
    record.reset()
    record.densities.add(torch.tensor(0.125))
    assert record.density_sum == 0.125
