"""Compensations around a ring of processes: output and gradients are those of one process."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from dit_accel.patches.learned import is_learned
from tests.kernels.test_linear_branch import oracle, rounding
from tests.patches import ring_learned_ranks
from tests.patches.ring_learned_ranks import LEARNED, MODELS, RECIPES_OF
from tests.patches.test_trained_in_parallel import assert_equal
from tests.patches.trained_ranks import train
from tests.patches.ulysses_ranks import ended

# Wan and Qwen-Image modulate in float32, and each process adds up its own tokens' gradients there.
FLOAT32 = torch.finfo(torch.float32).eps
TOLERANCE = {"wan": FLOAT32, "qwen-image": FLOAT32, "flux": 1e-10}


def _ranks(world: int, work: Any, path: Any) -> list[dict[Any, Any]]:
    assert ended(world, work, path) == [0] * world
    return [torch.load(path / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: Any, tmp_path_factory: Any) -> list[dict[Any, Any]]:
    """What each process found."""
    return _ranks(request.param, ring_learned_ranks.work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("form", ring_learned_ranks.EPS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_linear_branch_is_its_definition(ranks, backend, form):
    if ("branch", backend, form) not in ranks[0]:
        pytest.skip("Triton is interpreted by two processes, where there is no GPU")
    given = ring_learned_ranks.branch_inputs()
    exact = [given[name].double().requires_grad_() for name in ("q", "k", "v", "weight", "bias")]
    marginal = ~(given["critical"] | given["negligible"]) if form == "blocks" else None
    rows = given["rows"][None, None]
    eps = ring_learned_ranks.EPS[form]
    out = oracle(*exact[:3], "softmax", marginal, (32, 32), rows, given["key_mask"], eps) @ exact[3].T + exact[4]
    out.backward(given["grad"].double())
    unit = rounding(torch.float32)
    for place, wanted in enumerate([out.detach(), *(x.grad for x in exact)]):
        parts = [found["branch", backend, form][place] for found in ranks]
        got = torch.cat(parts, 1) if place < 4 else parts[0]
        assert (got - wanted).abs().max() <= 16 * unit * wanted.abs().max(), place


@cache
def alone(name: str, recipe: str) -> Any:
    """The same in one process."""
    build, inputs = MODELS[name]
    return train(build(), inputs(), LEARNED[recipe])


@pytest.mark.parametrize(("name", "recipe"), [(name, recipe) for name in MODELS for recipe in RECIPES_OF[name]])
def test_a_ring_learns_what_one_process_learns(ranks, name, recipe):
    wanted = alone(name, recipe)
    learned = {each: grad for each, grad in wanted[1].items() if is_learned(each)}
    assert len(learned) >= 2  # one in each layer at least
    assert all(grad.any() for grad in learned.values())
    # Means of blocks are float32, and products of other shapes round otherwise.
    tolerances = (4 * FLOAT32, FLOAT32) if recipe == "coarse" else (TOLERANCE[name], 1e-11)
    for found in ranks:
        assert_equal(found[name, recipe], wanted, *tolerances)
