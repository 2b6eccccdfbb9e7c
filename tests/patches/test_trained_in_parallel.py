"""Training under diffusers' context parallelism: the gradients of several processes are those of one."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from dit_accel import Recipe
from dit_accel.patches.learned import is_learned
from tests.patches import trained_ranks
from tests.patches.trained_ranks import COMPILED, KINDS, LEARNED, MASS, MODELS, RECIPES_OF, SHARDED, train
from tests.patches.ulysses_ranks import found_by, wan, wan_given
from tests.recipes import POOLED

# Wan modulates in float32, and each process adds up its own tokens' gradients there.
TOLERANCE = {"wan": torch.finfo(torch.float32).eps, "flux": 1e-10}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: Any, tmp_path_factory: Any) -> list[dict[Any, Any]]:
    """What each process found."""
    return found_by(request.param, trained_ranks.work, tmp_path_factory.mktemp("ranks"))


@cache
def alone(name: str, recipe: Recipe) -> Any:
    """The same in one process."""
    build, inputs = MODELS[name]
    return train(build(), inputs(), recipe)


def assert_as_one(found: Any, name: str, recipe: Recipe) -> None:
    """Output, gradients of every parameter, and counted calls."""
    assert_equal(found, alone(name, recipe), TOLERANCE[name])


def assert_equal(found: Any, wanted: Any, tolerance: float, of_output: float = 1e-11) -> None:
    (out, grads, summary), (one, own, _) = found, wanted
    assert (out - one).abs().max() < of_output * one.abs().max()
    assert grads.keys() == own.keys()
    # Learned parameters have gradients of another size than weights.
    for learned in {is_learned(each) for each in own}:
        names = [each for each in own if is_learned(each) == learned]
        largest = max(float(own[each].abs().max()) for each in names)
        for each in names:
            assert float((grads[each] - own[each]).abs().max()) <= tolerance * largest, each
    assert not summary.dense_calls
    assert summary.sparse_calls == 2


@pytest.mark.parametrize(("name", "recipe"), [(name, recipe) for name in MODELS for recipe in RECIPES_OF[name]])
def test_what_a_layer_learned_is_shared_by_heads(ranks, name, recipe):
    learned = {each: grad for each, grad in alone(name, LEARNED[recipe])[1].items() if is_learned(each)}
    assert len(learned) >= 2  # one in each layer at least
    if not LEARNED[recipe].select.is_learned:  # which only chooses
        assert all(grad.any() for grad in learned.values())
    for found in ranks:
        assert_as_one(found["learned", name, recipe], name, LEARNED[recipe])


@pytest.mark.parametrize("how", ["as stored", "reentrant"])
@pytest.mark.parametrize("recipe", ["pooled", "mass"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_blocks_are_repeated_by_all(ranks, kind, recipe, how):
    for found in ranks:
        assert_as_one(found["checkpointing", kind, recipe, how], "wan", {"pooled": POOLED, "mass": MASS}[recipe])


def test_heads_and_tokens_that_cannot_be_shared_evenly_have_gradients_too(ranks):
    heads, size = trained_ranks.RAGGED[len(ranks)]
    wanted = train(wan(heads), wan_given(*size), trained_ranks.SLA)
    for found in ranks:
        assert_equal(found["anything"], wanted, TOLERANCE["wan"])


@pytest.mark.parametrize("how", ["", "as stored"])
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_weights_have_the_gradients_of_one_process(ranks, kind, how):
    for found in ranks:
        assert_as_one(found["sharded", kind, how], "wan", SHARDED[kind])


def test_groups_of_processes_have_samples_of_their_own(tmp_path):
    each = [train(wan(), trained_ranks.sample(number), trained_ranks.SLA) for number in range(2)]
    summed = {name: grad + each[1][1][name] for name, grad in each[0][1].items()}
    for rank, found in enumerate(found_by(4, trained_ranks.groups, tmp_path)):
        out, _, summary = each[rank // 2]
        assert_equal(found["groups"], (out, summed, summary), TOLERANCE["wan"])


def test_compiled_code_is_sparse_and_has_gradients(tmp_path):
    for found in found_by(2, trained_ranks.compiled, tmp_path):
        for name, (_, recipe) in COMPILED.items():
            for how in ("blocks", "whole"):
                assert_as_one(found[name, how], "wan", recipe)
