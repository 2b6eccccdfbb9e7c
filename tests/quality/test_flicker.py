"""Flicker: zero without it, the injected size with it, blind to steady errors."""

import dataclasses

import numpy as np
import pytest
import torch

from dit_accel.quality import ClipPair, MetricUnavailable, flicker
from dit_accel.quality.flicker import Flicker, FlickerExcess, FlickerFlow, _reference_flow, _sample
from tests.quality.clips import moving_clip, with_blinking


@pytest.mark.parametrize("metric", [Flicker(), FlickerFlow(), FlickerExcess()], ids=lambda m: m.name)
def test_zero_for_identical_clips(metric: Flicker) -> None:
    clip = moving_clip()
    assert metric(ClipPair(clip, clip.clone())) == 0


@pytest.mark.parametrize("metric", [Flicker(), FlickerFlow(), FlickerExcess()], ids=lambda m: m.name)
def test_rises_with_injected_flicker(metric: Flicker) -> None:
    steady = with_blinking(moving_clip(), 0.0)
    values = [metric(ClipPair(steady, with_blinking(moving_clip(), a))) for a in (0.01, 0.03, 0.09)]
    assert 0 < values[0] < values[1] < values[2]


@pytest.mark.parametrize("metric", [Flicker(), FlickerFlow()], ids=lambda m: m.name)
def test_size_of_blinking_brightness(metric: Flicker) -> None:
    """Brightness alternating by ±a changes each transition by 2a, with or without motion."""
    steady = with_blinking(moving_clip(), 0.0)
    value = metric(ClipPair(steady, with_blinking(moving_clip(), 0.05)))
    assert value == pytest.approx(255 * 0.1, rel=1e-3)


@pytest.mark.parametrize("metric", [Flicker(), FlickerFlow(), FlickerExcess()], ids=lambda m: m.name)
def test_a_steady_shift_is_no_flicker(metric: Flicker) -> None:
    clip = with_blinking(moving_clip(), 0.0)
    assert metric(ClipPair(clip, clip + 0.1)) == pytest.approx(0, abs=1e-3)


def test_flicker_is_its_definition() -> None:
    """Against float64 numpy, of clips whose every transition differs."""
    drawn = torch.Generator().manual_seed(0)
    pair = ClipPair(*(torch.rand(5, 9, 7, 3, generator=drawn) for _ in range(2)))
    changes = [np.diff(clip.numpy().astype(np.float64), axis=0) for clip in (pair.candidate, pair.reference)]
    # Differences of two float32 numbers below 1 are off by at most 3 roundings of 2^-24.
    assert Flicker()(pair) == pytest.approx(255 * np.abs(changes[0] - changes[1]).mean(), abs=255 * 3 * 2**-24)


def test_flow_forgives_an_error_that_moves_with_the_content() -> None:
    """Recoloured content blinks at a fixed pixel but not along its motion."""
    clip = with_blinking(moving_clip(6, speed=3.0), 0.0)
    recoloured = (clip * torch.tensor([0.7, 1.0, 0.7])).clamp(0, 1)
    pair = ClipPair(clip, recoloured)
    assert FlickerFlow()(pair) < 0.25 * Flicker()(pair)


def test_excess_is_negative_for_a_steadier_candidate() -> None:
    clip = with_blinking(moving_clip(), 0.0)
    assert FlickerExcess()(ClipPair(with_blinking(moving_clip(), 0.05), clip)) < -1


def test_flow_follows_the_motion() -> None:
    clip = moving_clip(4, speed=2.0)
    flow, seen = _reference_flow(ClipPair(clip, clip))
    assert seen.float().mean() > 0.7
    assert flow[..., 0][seen].median() == pytest.approx(-2.0, abs=0.2)
    assert flow[..., 1][seen].median() == pytest.approx(0.0, abs=0.2)
    still = (clip[1:] - clip[:-1]).abs()[seen].mean()
    warped = (clip[1:] - _sample(clip[:-1], flow)).abs()[seen].mean()
    assert warped < 0.2 * still


@pytest.mark.parametrize("metric", [Flicker(), FlickerFlow(), FlickerExcess()], ids=lambda m: m.name)
def test_an_image_gives_a_reason(metric: Flicker) -> None:
    clip = moving_clip(1)
    with pytest.raises(MetricUnavailable, match="at least 2 frames, got 1"):
        metric(ClipPair(clip, clip))


def test_a_pair_of_another_dense_clip_knows_nothing_of_the_first() -> None:
    dense, other = moving_clip(5, speed=2.0), moving_clip(5, speed=-1.0)
    pair = ClipPair(dense, with_blinking(dense, 0.03))
    FlickerFlow()(pair)
    moved = dataclasses.replace(pair, reference=other)
    assert FlickerFlow()(moved) == FlickerFlow()(ClipPair(other, pair.candidate))


def test_a_clip_beside_itself_is_held_once() -> None:
    clip = (moving_clip(3) * 255).to(torch.uint8)
    pair = ClipPair(clip, clip)
    assert pair.candidate is pair.reference
    assert torch.equal(pair.reference, clip / 255)


def test_the_dense_clips_flow_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And values are those of pairs that know nothing of each other, also of the dense clip beside another one."""
    found = []
    monkeypatch.setattr(flicker, "_reference_flow", lambda pair: found.append(pair) or _reference_flow(pair))
    dense, other = moving_clip(5, speed=2.0), moving_clip(5, speed=-1.0)
    clips = [with_blinking(dense, 0.03), with_blinking(dense, 0.09), other]
    metrics = (FlickerFlow(), FlickerExcess())
    alone = [[metric(ClipPair(dense, clip)) for metric in metrics] for clip in clips]
    assert len(found) == 6
    found.clear()
    pair = ClipPair(dense, dense)
    together = [[metric(pair.beside(clip)) for metric in metrics] for clip in clips]
    assert together == alone
    assert len(found) == 1
    assert not ClipPair(other, dense).known
    with pytest.raises(ValueError, match="one shape"):
        pair.beside(moving_clip(4))
