"""Pipelines that run at once, each in a thread: the bits that each gives alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import dit_accel
from tests import pipe_calls
from tests.pipe_calls import Call

RECIPES = ("balanced", "fast", "max", "carried")


@pytest.fixture(autouse=True)
def _threads_take_short_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(jobs: list[Callable[[], list[torch.Tensor]]]) -> list[list[torch.Tensor]]:
    with ThreadPoolExecutor(len(jobs)) as threads:
        return [future.result() for future in [threads.submit(job) for job in jobs]]


def assert_same(alone: list[list[torch.Tensor]], together: list[list[torch.Tensor]]) -> None:
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def several(pipe, family: str, *calls: Call) -> list[torch.Tensor]:
    return [pipe_calls.perform(pipe, family, call) for call in calls]


def test_profiles_of_several_families_at_once():
    """Sizes and numbers of steps differ, within a thread too."""
    wanted = [
        ("wan", "balanced", Call(10, 0), Call(7, 1)),
        ("wan", "fast", Call(12, 1), Call(9, 0, guided=False)),
        ("wan", "max", Call(9, 2), Call(11, 1)),
        ("wan", "carried", Call(11, 1), Call(8, 0)),
        ("flux", "carried", Call(8, 0), Call(10, 1)),
        ("hunyuan", "carried", Call(7, 0), Call(9, 1)),
        ("ltx", "fast", Call(10, 0), Call(8, 1)),
    ]
    pipes = [pipe_calls.build(family) for family, *_ in wanted]
    handles = [dit_accel.patch(pipe, recipe) for pipe, (_, recipe, *_) in zip(pipes, wanted, strict=True)]
    jobs = [partial(several, pipe, family, *calls) for pipe, (family, _, *calls) in zip(pipes, wanted, strict=True)]
    alone = [job() for job in jobs]
    counted = [handle.summary().sparse_calls for handle in handles]
    for _ in range(2):
        assert_same(alone, at_once(jobs))
    assert [handle.summary().sparse_calls for handle in handles] == [3 * count for count in counted]
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("recipe", RECIPES)
def test_pipelines_of_one_transformer_at_once(recipe):
    pipe = pipe_calls.build("wan")
    pipes = [pipe, pipe_calls.another(pipe), pipe_calls.another(pipe)]
    with dit_accel.patch(pipe, recipe) as handle:
        jobs = [
            partial(several, pipes[0], "wan", Call(10, 0), Call(7, 1)),
            partial(several, pipes[1], "wan", Call(7, 1), Call(12, 0)),
            partial(several, pipes[2], "wan", Call(12, 2, guided=False), Call(10, 0, seed=1)),
        ]
        alone = [job() for job in jobs]
        counted = handle.summary().sparse_calls
        for _ in range(2):
            assert_same(alone, at_once(jobs))
        assert handle.summary().sparse_calls == 3 * counted > 0


def test_patches_come_and_go_while_others_run():
    pipes = [pipe_calls.build("wan") for _ in RECIPES]

    def cycle(pipe, recipe: str) -> list[torch.Tensor]:
        made = []
        for number in range(4):
            call = Call(6, number % 3)
            with dit_accel.accelerate(pipe, recipe):
                made += several(pipe, "wan", call)
            made += several(pipe, "wan", Call(2, number % 3))
        return made

    jobs = [partial(cycle, pipe, recipe) for pipe, recipe in zip(pipes, RECIPES, strict=True)]
    alone = [job() for job in jobs]
    for _ in range(2):
        assert_same(alone, at_once(jobs))
