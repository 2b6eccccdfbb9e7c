"""Compensations around a ring of processes: output and gradients are those of one process."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch

from dit_accel.patches.learned import is_learned
from dit_accel.ring import shared_out
from tests.kernels.test_linear_branch import oracle, rounding
from tests.patches import ring_learned_ranks
from tests.patches.ring_learned_ranks import CARRIED, INFERENCE, LEARNED, MODELS, RECIPES_OF
from tests.patches.ring_ranks import RAGGED, UNIFIED
from tests.patches.test_trained_in_parallel import assert_equal
from tests.patches.trained_ranks import train
from tests.patches.ulysses_ranks import found_by, patched, wan, wan_given, wan_pipeline

# Wan and Qwen-Image modulate in float32, and each process adds up its own tokens' gradients there.
FLOAT32 = torch.finfo(torch.float32).eps
TOLERANCE = {"wan": FLOAT32, "qwen-image": FLOAT32, "flux": 1e-10}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: Any, tmp_path_factory: Any) -> list[dict[Any, Any]]:
    """What each process found."""
    return found_by(request.param, ring_learned_ranks.work, tmp_path_factory.mktemp("ranks"))


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
    for place, wanted in enumerate([out.detach(), out.detach(), *(x.grad for x in exact)]):
        parts = [found["branch", backend, form][place] for found in ranks]
        got = torch.cat(parts, 1) if place < 5 else parts[0]
        assert (got - wanted).abs().max() <= 16 * unit * wanted.abs().max(), place


@cache
def alone(name: str, recipe: str) -> Any:
    """The same in one process."""
    build, inputs = MODELS[name]
    return train(build(), inputs(), LEARNED[recipe])


def _tolerances(name: str, recipe: str) -> tuple[float, float]:
    """Of gradients, and of the output."""
    if recipe.startswith("coarse"):  # means of blocks are float32, and products of other shapes round otherwise
        return 4 * FLOAT32, 4 * FLOAT32
    # What gates make of their numbers is float32 too, token by token.
    return 4 * FLOAT32 if recipe in ("output gate", "routed heads") else TOLERANCE[name], 1e-11


@pytest.mark.parametrize(("name", "recipe"), [(name, recipe) for name in MODELS for recipe in RECIPES_OF[name]])
def test_a_ring_learns_what_one_process_learns(ranks, name, recipe):
    wanted = alone(name, recipe)
    learned = {each: grad for each, grad in wanted[1].items() if is_learned(each)}
    assert len(learned) >= 2  # one in each layer at least
    assert all(grad.any() for grad in learned.values())
    for found in ranks:
        assert_equal(found[name, recipe], wanted, *_tolerances(name, recipe))


@pytest.mark.parametrize("recipe", INFERENCE)
@pytest.mark.parametrize("name", MODELS)
def test_a_ring_gives_what_one_process_gives(ranks, name, recipe):
    build, inputs = MODELS[name]
    bare = INFERENCE[recipe].with_fields({"compensate": "none"})
    wanted, _ = patched(build(), inputs(), INFERENCE[recipe])
    if not bare.select.is_learned:
        without, _ = patched(build(), inputs(), bare)
        assert (wanted - without).abs().max() > 1e-4 * wanted.abs().max()  # else the test shows nothing
    for found in ranks:
        out, summary = found[name, recipe]
        assert (out - wanted).abs().max() < 4 * FLOAT32 * wanted.abs().max()
        assert summary.sparse_calls == 2


@pytest.mark.parametrize("recipe", ["residual", "residual of 8"])
def test_means_of_blocks_count_as_work_around_a_ring(ranks, recipe):
    _, alone = patched(wan(), wan_given(), INFERENCE[recipe])
    rows = torch.ones(-(-288 // INFERENCE[recipe].select.block[0]))
    numbers = torch.tensor([last - first for first, last in pairwise(shared_out(rows, len(ranks)))])
    for found in ranks:
        densities = torch.tensor(found["wan", recipe][1].rank_densities)
        assert float((densities * numbers).sum() / len(rows)) == pytest.approx(alone.density, rel=1e-6)


@pytest.mark.parametrize("recipe", ["paper", "coarse", "output gate"])
def test_ragged_lengths(ranks, recipe):
    wanted = train(wan(), wan_given(*RAGGED), LEARNED[recipe])
    for found in ranks:
        assert_equal(found["anything", recipe], wanted, *_tolerances("wan", recipe))


@pytest.mark.parametrize("how", ["as stored", "reentrant"])
def test_checkpointed_blocks_exchange_their_sums_again(ranks, how):
    for found in ranks:
        assert_equal(found["checkpointing", how], alone("wan", "paper"), TOLERANCE["wan"])


@pytest.mark.parametrize("select", CARRIED)
def test_what_a_dense_step_left_out_is_carried(ranks, select):
    wanted, one = ring_learned_ranks.run(wan_pipeline(), CARRIED[select])
    without, _ = ring_learned_ranks.run(wan_pipeline(), CARRIED[select].with_fields({"compensate": "none"}))
    change = (wanted - without).abs().max()
    for found in ranks:
        out, summary = found["carried", select]
        assert (out - wanted).abs().max() < 1e-3 * change
        assert (summary.sparse_calls, summary.dense_calls) == (one.sparse_calls, one.dense_calls)


def test_what_samples_single_keys_is_refused(ranks):
    for found in ranks:
        assert found["refused"].startswith(
            "compensate KeyPyramid samples single keys of the whole sequence, which ring"
        )


def test_the_form_that_is_refused_is_named(ranks):
    for found in ranks:
        assert found["refused", "form"] == (
            "select Learned with form='linear', unlike others of its forms, looks at single tokens of the whole "
            "sequence, which ring attention shares out: use ulysses_degree in place of ring_degree, or another recipe."
        )


def test_compiled_code_goes_round_with_gradients(tmp_path):
    for found in found_by(2, ring_learned_ranks.compiled, tmp_path):
        for recipe in ring_learned_ranks.COMPILED:
            for how in ("blocks", "whole"):
                assert_equal(found[recipe, how], alone("wan", recipe), TOLERANCE["wan"])


def test_two_rings_of_two(tmp_path):
    found = found_by(4, ring_learned_ranks.unified, tmp_path)
    for name, (build, inputs) in UNIFIED.items():
        for recipe in ring_learned_ranks.SHARED_TWICE:
            wanted = train(build(), inputs(), LEARNED[recipe])
            for one in found:
                assert_equal(one[name, recipe], wanted, *_tolerances(name, recipe))
