"""A server that sees many sizes, step counts and broken-off runs does not grow, and a dropped pipeline is gone."""

from __future__ import annotations

import gc
import random
import weakref

import dit_accel
from benchmarks.memory_server import RECIPE, generate, tensors_alive
from tests.tiny import TINY


def test_what_is_kept_does_not_grow_with_the_generations():
    pick = random.Random(0)
    pipe = TINY["wan"].build()
    handle = dit_accel.patch(pipe, RECIPE)
    alive = []
    for number in range(1, 41):
        generate(pipe, pick)
        if number % 10 == 0:
            handle.summary()  # what calls have counted is put together when it is read
            alive.append(tensors_alive())
    assert handle.summary().sparse_calls > 100
    # A layout keeps tables of its own, and eight are kept: a few of the last ones have more or fewer.
    assert max(alive[1:]) - alive[0] <= 8, alive
    model = weakref.ref(pipe.transformer)
    del pipe, handle
    gc.collect()
    assert model() is None
